"""Time limits on a request's body and on its whole answer, in the process that answers."""

import asyncio
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from sere_ray.proxy.limits import Limits
from sere_ray.proxy.refusals import TOO_SLOW
from sere_ray.serve.gateway.hang_ups import end_task
from sere_ray.serve.gateway.messages import begins_stream
from sere_ray.serve.gateway.refusals import App, Message, Receive, Refusal, Send


def too_slow() -> Refusal:
    """The refusal of a request whose body took too long; a new one each time."""
    return Refusal(408, "request_timeout", TOO_SLOW, {"connection": "close"})


def out_of_time(seconds: float) -> Refusal:
    """The refusal of a request whose answer took too long; clients of OpenAI's do not repeat it."""
    message = f"The answer took longer than {seconds:g} s (limits.answer_s); ask for less."
    return Refusal(408, "answer_timeout", message, {"x-should-retry": "false"})


class AnswerClock:
    """Seconds that an answer has taken so far, without those in which it waited for an engine."""

    _OF_SCOPE = "sere.answer_clock"

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._stopped: float | None = None

    def put_into(self, scope: MutableMapping[str, Any]) -> None:
        """Let the applications below find it in the scope of the request."""
        scope[self._OF_SCOPE] = self

    @classmethod
    def of(cls, scope: MutableMapping[str, Any]) -> "AnswerClock":
        """The clock of a request; a new one where no layer has put one into its scope."""
        return scope.get(cls._OF_SCOPE) or cls()

    @property
    def seconds(self) -> float:
        """What it shows now."""
        return (self._stopped or time.monotonic()) - self._begun

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Do not count the time of the block."""
        self._stopped = time.monotonic()
        try:
            yield
        finally:
            self._begun += time.monotonic() - self._stopped
            self._stopped = None


class TimeLimitLayer:
    """Pure ASGI middleware: a late body is refused, a late answer is ended.

    The first is raised out of ``receive`` as a :class:`Refusal`, which the access layer answers.

    Args:
        app: the application; it ends its work when it is cancelled.
        limits: of the deployment file.
    """

    def __init__(self, app: App, *, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request within the limits."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        answer, clock = _Answer(send), AnswerClock()
        clock.put_into(scope)
        serving = self._app(scope, _in_time(receive, self._limits.body_s), answer.send)
        seconds = self._limits.answer_s
        if seconds is None:
            return await serving
        task = asyncio.ensure_future(serving)
        try:
            while not task.done() and clock.seconds < seconds:
                await asyncio.wait((task,), timeout=seconds - clock.seconds)
        except asyncio.CancelledError:
            await end_task(task)
            raise
        if task.done():
            return task.result()
        answer.is_over = True
        ending = asyncio.ensure_future(end_task(task))
        await answer.tell(out_of_time(seconds))
        await ending


def _in_time(receive: Receive, seconds: float) -> Receive:
    """Messages of a client, as long as its body arrives in time."""
    deadline = asyncio.get_running_loop().time() + seconds
    is_whole = False

    async def receive_in_time() -> Message:
        nonlocal is_whole
        if is_whole:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise too_slow() from None
        is_whole = not message.get("more_body", False)
        return message

    return receive_in_time


class _Answer:
    """An answer as far as it was sent."""

    def __init__(self, send: Send) -> None:
        self._send, self.is_over = send, False
        self._has_begun = self._has_ended = self._is_stream = False

    async def send(self, message: Message) -> None:
        """Send a part of it, until it is over."""
        if self.is_over:
            return
        if message["type"] == "http.response.start":
            self._has_begun = True
            self._is_stream = begins_stream(message)
        elif message["type"] == "http.response.body":
            self._has_ended = not message.get("more_body", False)
        await self._send(message)

    async def tell(self, refusal: Refusal) -> None:
        """End it with an error: as the answer, or as the last event of a stream."""
        if self._has_ended:
            return
        if not self._has_begun:
            return await refusal.answer(self._send)
        event = refusal.event() if self._is_stream else b""
        await self._send({"type": "http.response.body", "body": event, "more_body": False})
