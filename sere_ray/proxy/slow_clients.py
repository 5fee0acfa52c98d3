"""Time limits on requests that arrive slowly, in servers of uvicorn's: Ray's proxy and replicas.

uvicorn itself waits for the rest of a request as long as the client likes. Ray asks the function
that ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names for middleware, in the process of its proxy
and before it starts the server there.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, ClassVar

import uvicorn.config
from starlette.middleware import Middleware
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from sere_ray.proxy.limits import RAY_SWITCHES, Limits
from sere_ray.proxy.refusals import TOO_SLOW, whole_answer

PROTOCOL = "sere_ray.proxy.slow_clients:TimedProtocol"
_DROPPED = frozenset(name.encode() for name in RAY_SWITCHES)


def middleware() -> list[Middleware]:
    """Have this process's servers end slow requests; middleware that drops Ray's own switches."""
    limit_requests(Limits.of_environment())
    return [Middleware(DropHeaders)]


def limit_requests(limits: Limits) -> None:
    """Give the limits to all servers of uvicorn's that this process starts from now on."""
    TimedProtocol.limits = limits
    uvicorn.config.HTTP_PROTOCOLS["auto"] = PROTOCOL


class DropHeaders:
    """ASGI middleware: headers that a client must not set are not passed on, and none that is not
    UTF-8, which Ray would read as that and answer 500."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Serve one request without these headers."""
        if "headers" in scope:
            headers = [
                h for h in scope["headers"] if h[0].lower() not in _DROPPED and _is_utf8(h[1])
            ]
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


class TimedProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's connection, which ends where a request's headers or body take too long.

    Where more connections wait for a request than may, the one that has waited longest is ended: a
    request that comes in one piece is never in the way, and never locked out.
    """

    limits = Limits.model_validate({})
    unfinished: ClassVar[dict["TimedProtocol", None]] = {}
    """Connections that wait for (the rest of) a request, the oldest first."""
    _timer: asyncio.TimerHandle | None = None
    _waits_for = ""

    def connection_made(self, transport: Any) -> None:
        """A client connects: its headers are awaited."""
        super().connection_made(transport)
        self._wait_for("headers", self.limits.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._wait_for("nothing")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some of a request: what is awaited now?"""
        super().data_received(data)
        cycle = self.cycle
        if self.transport.is_closing():
            self._wait_for("nothing")
        elif cycle is None or (cycle.response_complete and not cycle.more_body):
            self._wait_for("headers", self.limits.header_s)
        elif cycle.more_body:
            self._wait_for("body", self.limits.body_s)
        else:
            self._wait_for("nothing")

    def _wait_for(self, what: str, seconds: float = 0.0) -> None:
        """Begin to wait; goes on where that is awaited already."""
        if what == self._waits_for:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._waits_for = what
        self.unfinished.pop(self, None)
        if what == "nothing":
            return
        self._timer = self.loop.call_later(seconds, self._end)
        self.unfinished[self] = None
        if len(self.unfinished) > self.limits.max_unfinished:
            next(iter(self.unfinished))._end()

    def _end(self) -> None:
        """Say why, and close; a client that has an answer already gets no second one."""
        has_answer = self._waits_for == "body" and self.cycle.response_started
        self._wait_for("nothing")
        if not has_answer:
            with suppress(RuntimeError):  # the client is gone
                self.transport.write(whole_answer(408, "request_timeout", TOO_SLOW))
        self.transport.close()
