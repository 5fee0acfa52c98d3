"""Refusals: every error that a client gets of us, in OpenAI's form.

Where vLLM's own server would refuse as well, ``type`` and ``code`` are vLLM's (:func:`as_vllm`).
"""

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sere_ray.proxy.refusals import error_body

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
"""An application of ASGI, and the types of its messages."""


class Refusal(Exception):
    """An error answer in OpenAI's form.

    Args:
        status: of HTTP.
        code: what programs compare: a short name, or vLLM's number.
        message: for people: what is wrong and what to do.
        headers: of the answer, beside those of its content.
        kind: the field ``type``; None = OpenAI's name for this status.
        param: the field of the request that is wrong, never its value.
    """

    def __init__(
        self,
        status: int,
        code: str | int,
        message: str,
        headers: Mapping[str, str] | None = None,
        *,
        kind: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})
        self.kind, self.param = kind, param

    def body(self) -> bytes:
        """The JSON document."""
        return error_body(self.status, self.code, str(self), kind=self.kind, param=self.param)

    def event(self) -> bytes:
        """The JSON document as an event of a stream that has begun."""
        return b"data: " + self.body() + b"\n\n"

    async def answer(self, send: Send) -> None:
        """Send it with ASGI as the whole answer to a request."""
        content = self.body()
        headers = {"content-type": "application/json", "content-length": str(len(content))}
        pairs = [(k.encode(), v.encode()) for k, v in {**headers, **self.headers}.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": pairs})
        await send({"type": "http.response.body", "body": content})


def as_vllm(status: int, message: str, *, param: str | None = None) -> Refusal:
    """A refusal with the fields that vLLM's own server has at this status."""
    return Refusal(status, status, message, kind=HTTPStatus(status).phrase, param=param)


def failed() -> Refusal:
    """The refusal of a request in whose course something failed that nobody has foreseen."""
    message = "The server failed at this request; its log says why."
    return Refusal(500, 500, message, kind="InternalServerError")


def answer(refusal: Refusal) -> "Response":
    """The answer of a Starlette application to a refused request."""
    from starlette.responses import Response

    return Response(refusal.body(), refusal.status, refusal.headers, "application/json")


async def http_error(request: "Request", error: Exception) -> "Response":
    """Starlette's own errors (no such path or model) in OpenAI's form."""
    from starlette.exceptions import HTTPException

    assert isinstance(error, HTTPException)
    refusal = as_vllm(error.status_code, str(error.detail))
    refusal.headers = dict(error.headers or {})
    return answer(refusal)
