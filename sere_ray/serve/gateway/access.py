"""One ASGI layer in front of everything: who may ask, how much, and in which tier.

It wraps the application itself, so every path passes it: Ray's proxy, direct streaming, HAProxy.
Errors have OpenAI's form. Without any key only this machine is served.
"""

import hmac
import json
from collections.abc import Callable, Mapping, MutableMapping
from ipaddress import ip_address
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sere_ray.policy.tiers import HEADER, NEVER, SCORE_XARG, TIERS, XARG
from sere_ray.proxy.limits import LOOPBACK_HEADER
from sere_ray.serve.gateway.keys import Key, KeyFile, KeyRing, digest
from sere_ray.serve.gateway.refusals import App, Message, Receive, Refusal, Send

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
        1024, ge=1, description="requests under way in one ingress process, over all keys"
    )
    max_concurrent_per_key: int = Field(
        256, ge=1, description="requests of one key under way in one ingress process"
    )


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
        self._under_way: dict[str, int] = {}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        send = self._counting(send)
        try:
            key = self._authorize(scope)
            self._enter(key)
        except Refusal as refusal:
            return await refusal.answer(send)
        try:
            scope = {**scope, PRINCIPAL: key.name}
            try:
                if scope["method"] in ("POST", "PUT", "PATCH"):
                    scope, receive = await self._checked(scope, receive, key)
            except Refusal as refusal:
                return await refusal.answer(send)
            await self._app(scope, receive, send)
        finally:
            self._leave(key)

    def _counting(self, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(message["status"])
            await send(message)

        return counted

    def _authorize(self, scope: Mapping[str, Any]) -> Key:
        path, headers = _path(scope), _headers(scope)
        is_admin = path.startswith("/sere/")
        if scope["method"] not in METHODS and (not is_admin or path in self._public):
            raise Refusal(  # a route of /sere/ says itself which methods it has, to an admin
                405, "method_not_allowed", "Method not allowed.", {"allow": ", ".join(METHODS)}
            )
        if not is_admin and not path.startswith("/v1/"):
            raise Refusal(404, "not_found", "No such path; see /v1/models.")
        if self._ring.is_open:
            if not _is_local(scope, headers, self._loopback):
                raise Refusal(
                    403,
                    "no_keys",
                    "This server has no API keys and serves only its own machine; "
                    "set access.keys_file in the deployment file.",
                )
            return _ANYBODY
        if path in self._public and scope["method"] in ("GET", "HEAD"):
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

    def _enter(self, key: Key) -> None:
        mine = self._under_way.get(key.name, 0)
        if (
            mine >= (VISITORS if key is _VISITOR else self._config.max_concurrent_per_key)
            or sum(self._under_way.values()) >= self._config.max_concurrent_requests
        ):
            raise Refusal(
                429, "rate_limit_exceeded", "Too many requests under way.", {"retry-after": "1"}
            )
        self._under_way[key.name] = mine + 1

    def _leave(self, key: Key) -> None:
        self._under_way[key.name] -= 1
        if not self._under_way[key.name]:
            del self._under_way[key.name]

    async def _checked(
        self, scope: MutableMapping[str, Any], receive: Receive, key: Key
    ) -> tuple[MutableMapping[str, Any], Receive]:
        """Read the body, refuse it if it is too large, and write into it the request's tier, and
        that it must not be scored where the key says so.

        Below ``/sere/`` the body stays as it is: there the application reads it, if the route
        takes one.
        """
        content = await _read_body(receive, _headers(scope), self._config.max_body_bytes)
        if _path(scope).startswith("/v1/"):
            body = _json_object(content)
            _set_tier(body, _headers(scope).get(HEADER), key)
            content = json.dumps(body).encode()
        replaced = (b"content-length", b"content-type", b"transfer-encoding")
        headers = [(k, v) for k, v in scope["headers"] if k.lower() not in replaced]
        headers += [
            (b"content-length", str(len(content)).encode()),
            (b"content-type", b"application/json"),
        ]
        return {**scope, "headers": headers}, _replay(content, receive)


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise Refusal(400, "invalid_json", "The body is not JSON.") from None
    if not isinstance(body, dict):
        raise Refusal(400, "invalid_json", "The body must be a JSON object.")
    return body


def _set_tier(body: dict[str, Any], header: str | None, key: Key) -> None:
    """Write the tier of a request, and a key's ban on scores, where the engine looks for them."""
    xargs = body.get("vllm_xargs")
    if xargs is not None and not isinstance(xargs, dict):
        raise Refusal(422, "invalid_parameter", "vllm_xargs must be an object.")
    asked = header if header is not None else (xargs or {}).get(XARG)
    tier = key.default_tier if asked is None else asked
    if tier not in TIERS:
        raise Refusal(
            422, "invalid_tier", f"Unknown tier {str(tier)[:40]!r}; allowed: {', '.join(TIERS)}."
        )
    if tier not in key.tiers:
        raise Refusal(403, "tier_not_permitted", f"This key may not ask for the tier {tier!r}.")
    others = {name: value for name, value in (xargs or {}).items() if name != XARG}
    if not key.score:
        others[SCORE_XARG] = NEVER
    if tier != "default":
        others[XARG] = tier
    if others:
        body["vllm_xargs"] = others
    else:
        body.pop("vllm_xargs", None)


async def _read_body(receive: Receive, headers: Mapping[str, str], limit: int) -> bytes:
    too_large = Refusal(413, "body_too_large", f"The body is larger than {limit} bytes.")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "disconnected", "The client went away.")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise too_large
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(content: bytes, receive: Receive) -> Receive:
    """Hand the body over once; afterwards the client's messages (a disconnect) come through."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    return replay


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
