"""One ASGI layer in front of everything: who may ask, how much, and in which tier.

It wraps the application itself, so every path passes it: Ray's proxy, direct streaming, HAProxy.
Errors have OpenAI's form. Without any key only this machine is served.
"""

import hmac
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from ipaddress import ip_address
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.middleware.cors import CORSMiddleware

from sere_ray.policy.tiers import HEADER
from sere_ray.proxy.limits import LOOPBACK_HEADER
from sere_ray.serve.gateway.bodies import answers_asked, for_engine, is_json, json_object
from sere_ray.serve.gateway.keys import Key, KeyFile, KeyRing, digest
from sere_ray.serve.gateway.messages import METHODS_WITH_BODY, read_body, replayed, with_body
from sere_ray.serve.gateway.refusals import App, Message, Receive, Refusal, Send, as_vllm, failed
from sere_ray.serve.gateway.routes import HEALTH, WITH_BODY

logger = logging.getLogger("ray.serve")
METHODS = ("GET", "HEAD", "POST", "PUT")
PRINCIPAL = "sere_principal"
"""Key of the ASGI scope: name of the key's holder."""
_ANYBODY = Key(name="loopback", sha256="0" * 64)
_VISITOR = Key(name="visitor", sha256="0" * 64)
VISITORS = 64
"""Requests without a key under way at once: they take few of the places of those with one."""


class AccessConfig(BaseModel):
    """Limits and key file: the part ``access`` of a deployment file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys_file: str | None = Field(None, description="hashed keys, on every node with an ingress")
    max_body_bytes: int = Field(2 << 20, ge=1024, le=1 << 30)
    max_concurrent_requests: int = Field(
        1024, ge=1, description="answers under way in one ingress process, over all keys"
    )
    max_concurrent_per_key: int = Field(
        256, ge=1, description="answers (prompts times `n`) of one key under way in one process"
    )
    share_prefix_cache: bool = Field(
        False, description="whether keys of different groups find each other's prompts"
    )
    allowed_origins: tuple[str, ...] = Field(
        (), description="pages of other origins that may ask, such as https://chat.example.com"
    )

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if re.fullmatch(r"https?://[^/\s*]+", origin) is None:
                raise ValueError(
                    f"{origin!r} is no origin; write it as https://chat.example.com, without a path"
                )
        return value


class AccessLayer:
    """ASGI middleware that lets a request through, or refuses it.

    Args:
        app: the application that it protects.
        config: limits and the key file.
        fixed: keys of the environment, which hold beside those of the file.
        public: paths that may be read without a key; a path must match exactly.
        count: called with the status of every answer.
        loopback: hash of the word by which a proxy says that a request is of this machine; None =
            there is no such proxy, the client's address tells.
    """

    def __init__(
        self,
        app: App,
        *,
        config: AccessConfig,
        fixed: KeyFile,
        public: frozenset[str] = frozenset(),
        count: Callable[[int], None] = lambda status: None,
        loopback: str | None = None,
    ) -> None:
        self._app, self._config = app, config
        self._public, self._count, self._loopback = public, count, loopback
        self._ring = KeyRing(config.keys_file, fixed)
        self._under_way: Counter[str] = Counter()
        self._for_pages = CORSMiddleware(
            self._serve,
            allow_origins=config.allowed_origins,
            allow_methods=METHODS,
            allow_headers=["*"],
        )

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        is_page = _headers(scope).get("origin") in self._config.allowed_origins
        await (self._for_pages if is_page else self._serve)(scope, receive, self._counting(send))

    async def _serve(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._admit(scope, receive, noted)
        except Refusal as refusal:
            if has_begun:
                raise
            await refusal.answer(send)
        except Exception:
            if has_begun:
                raise
            logger.exception("sere-ray: %s %s failed", scope["method"], scope["path"][:200])
            await failed().answer(send)

    async def _admit(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Let a request through while its answers have places.

        Raises:
            Refusal: it may not pass.
        """
        key = self._authorize(scope)
        places = 1
        self._enter(key, places)
        try:
            scope = {**scope, PRINCIPAL: key.name}
            if scope["method"] in METHODS_WITH_BODY:
                content, answers = await self._checked(scope, receive, key)
                self._enter(key, answers - places)
                places = answers
                scope, receive = with_body(scope, content), replayed(content, receive)
            await self._app(scope, receive, send)
        finally:
            self._leave(key, places)

    def _counting(self, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(message["status"])
            await send(message)

        return counted

    def _authorize(self, scope: Mapping[str, Any]) -> Key:
        path, headers = _path(scope), _headers(scope)
        self._check_origin(headers)
        is_admin, is_health = path.startswith("/sere/"), path.rstrip("/") == HEALTH
        if scope["method"] not in METHODS and path in self._public:
            raise Refusal(405, "method_not_allowed", "Method not allowed.", {"allow": "GET, HEAD"})
        if not (is_admin or is_health or path == "/v1" or path.startswith("/v1/")):
            raise as_vllm(404, "No such path; see /v1/models.")
        if self._ring.is_open:
            if not _is_local(scope, headers, self._loopback):
                raise Refusal(
                    403,
                    "no_keys",
                    "This server has no API keys and serves only its own machine; "
                    "set access.keys_file in the deployment file.",
                )
            return _ANYBODY
        if is_health or (path in self._public and scope["method"] in ("GET", "HEAD")):
            return _VISITOR
        scheme, _, value = headers.get("authorization", "").partition(" ")
        given = value.strip() if scheme.lower() == "bearer" else ""
        if is_admin:
            key = self._ring.admin(given)
            if key is None and self._ring.api_key(given) is not None:
                raise Refusal(403, "not_admin", "An API key does not open /sere; use the admin's.")
        else:
            key = self._ring.api_key(given)
        if key is None:
            raise Refusal(
                401,
                "invalid_api_key",
                "Missing or wrong key; send it as 'Authorization: Bearer KEY'.",
                {"www-authenticate": "Bearer"},
            )
        return key

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        """Refuse what a page of elsewhere asks: its reader may not know of it."""
        origin = headers.get("origin")
        own = (f"http://{headers.get('host', '')}", f"https://{headers.get('host', '')}")
        if origin not in (None, *own, *self._config.allowed_origins):
            raise Refusal(
                403,
                "foreign_origin",
                f"Pages of {str(origin)[:200]!r} may not ask here; allow them by "
                "access.allowed_origins in the deployment file.",
            )

    def _enter(self, key: Key, answers: int) -> None:
        mine = self._under_way[key.name] + answers
        if (
            mine > (VISITORS if key is _VISITOR else self._config.max_concurrent_per_key)
            or self._under_way.total() + answers > self._config.max_concurrent_requests
        ):
            raise Refusal(
                429, "rate_limit_exceeded", "Too many answers under way.", {"retry-after": "1"}
            )
        self._under_way[key.name] = mine

    def _leave(self, key: Key, answers: int) -> None:
        self._under_way[key.name] -= answers
        if not self._under_way[key.name]:
            del self._under_way[key.name]

    async def _checked(
        self, scope: Mapping[str, Any], receive: Receive, key: Key
    ) -> tuple[bytes, int]:
        """The body that the application gets, and how many answers it asks for.

        Below ``/sere/`` the body stays as it is: there the application reads it, if the route
        takes one. An engine gets only a JSON object, as we have read it; where vLLM takes no body,
        or none of this type, it gets none, and refuses the request.

        Raises:
            Refusal: too large, no JSON object, of a tier that is not permitted, or too many answers
                for any time.
        """
        path, headers = _path(scope), _headers(scope)
        content = await read_body(receive, headers, self._config.max_body_bytes)
        if path.startswith("/sere/"):
            return content, 1
        takes_body = path in WITH_BODY and scope["method"] == "POST"
        if not content or not takes_body or not is_json(headers.get("content-type", "")):
            return b"", 1
        body = json_object(content)
        answers, most = answers_asked(body), self._config.max_concurrent_per_key
        if answers > most:
            raise Refusal(
                400,
                "too_many_answers",
                f"The request asks for {_short(answers)} answers (prompts times n); a key may have "
                f"{most} under way (access.max_concurrent_per_key). Ask in parts.",
            )
        shares = self._config.share_prefix_cache or key is _ANYBODY
        group = None if shares else key.group or key.name
        return for_engine(body, headers.get(HEADER), key, cache_group=group), answers


def _short(number: int) -> str:
    return str(number) if number < 10**9 else "more than a billion"


def _path(scope: Mapping[str, Any]) -> str:
    path, root = str(scope["path"]), str(scope.get("root_path") or "")
    return path.removeprefix(root) if root and path.startswith(root) else path


def _headers(scope: Mapping[str, Any]) -> dict[str, str]:
    return {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}


def _is_local(scope: Mapping[str, Any], headers: Mapping[str, str], loopback: str | None) -> bool:
    """Whether a request comes from this machine and names it as such.

    The second keeps out web pages of elsewhere whose host name was made to point here. Behind a
    proxy that says where a request is from (``loopback``), only its word counts: the proxy itself
    is a peer of this machine, too, whoever asks it.
    """
    host = headers.get("host", "").rsplit(":", 1)[0].strip("[]")
    if loopback is None:
        is_near = _is_loopback((scope.get("client") or ("",))[0])
    else:
        is_near = hmac.compare_digest(digest(headers.get(LOOPBACK_HEADER, "")), loopback)
    return is_near and (host == "localhost" or _is_loopback(host))


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False
