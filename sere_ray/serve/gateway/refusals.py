"""Refusals: every error that a client gets, in OpenAI's form."""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

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
        code: a short name that programs compare.
        message: for people: what is wrong and what to do.
        headers: of the answer, beside those of its content.
    """

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})

    def body(self) -> bytes:
        """The JSON document."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": None, "code": self.code}
        return json.dumps({"error": error}).encode()

    async def answer(self, send: Send) -> None:
        """Send it with ASGI as the whole answer to a request."""
        content = self.body()
        headers = {"content-type": "application/json", "content-length": str(len(content))}
        pairs = [(k.encode(), v.encode()) for k, v in {**headers, **self.headers}.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": pairs})
        await send({"type": "http.response.body", "body": content})


def answer(refusal: Refusal) -> "Response":
    """The answer of a Starlette application to a refused request."""
    from starlette.responses import Response

    return Response(refusal.body(), refusal.status, refusal.headers, "application/json")


async def http_error(request: "Request", error: Exception) -> "Response":
    """Starlette's own errors (no such path or model) in OpenAI's form."""
    from starlette.exceptions import HTTPException

    assert isinstance(error, HTTPException)
    code = "not_found" if error.status_code == 404 else "http_error"
    return answer(Refusal(error.status_code, code, str(error.detail), error.headers))
