"""An answer that nobody waits for is ended in the engine, whoever gave up: client, Ray or a limit.

At a hang-up Ray tells the server by ASGI's message and cancels the request's task, at once; at a
limit it only cancels. vLLM's routes wait for the message beside the work: a cancellation ends that
wait and leaves the work running, since ``asyncio.wait`` cancels nothing. So here the server is told
by the message first, whatever the cause.
"""

import asyncio
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from sere_ray.serve.gateway.refusals import App, Message, Receive, Send

GRACE_SECONDS = 5.0
"""How long a server may take to act on the message before its task is cancelled, too."""
DISCONNECT: Message = {"type": "http.disconnect"}


class HangUpLayer:
    """Pure ASGI middleware around a server that acts on ``http.disconnect``."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request; once it is cancelled nothing more is sent."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        cancelled = asyncio.Event()

        async def to_client(message: Message) -> None:
            if not cancelled.is_set():
                await send(message)

        async def from_client() -> Message:
            return await first_of(receive, cancelled)

        serving = asyncio.ensure_future(self._app(scope, from_client, to_client))
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.wait((serving,), timeout=GRACE_SECONDS)
            await end_task(serving)
            raise


async def end_task(task: asyncio.Future[None]) -> None:
    """Cancel a task and wait for its end; of its errors nobody is left to tell."""
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


async def first_of(receive: Receive, ended: asyncio.Event) -> Message:
    """The client's next message, or that it is gone as soon as ``ended`` is set."""
    if ended.is_set():
        return DISCONNECT
    message = asyncio.ensure_future(receive())
    end = asyncio.ensure_future(ended.wait())
    try:
        await asyncio.wait((message, end), return_when=asyncio.FIRST_COMPLETED)
        return message.result() if message.done() and not ended.is_set() else DISCONNECT
    finally:
        message.cancel()
        end.cancel()
