"""A client that hangs up frees its slot where Ray streams directly, too.

At a hang-up Ray tells the server by ASGI's message and cancels the request's task, at once. vLLM's
routes wait for the message beside the work: if the cancellation comes first, it ends that wait and
leaves the work running, since ``asyncio.wait`` cancels nothing. Here the message comes first.
"""

import asyncio
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from sere_ray.serve.gateway.refusals import App, Message, Receive, Send

GRACE_SECONDS = 5.0
"""How long a server may take to act on the message before its task is cancelled, too."""


class HangUpLayer:
    """Pure ASGI middleware around a server that acts on ``http.disconnect``."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request; once it is cancelled nothing more is sent."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        is_cancelled = False

        async def to_client(message: Message) -> None:
            if not is_cancelled:
                await send(message)

        serving = asyncio.ensure_future(self._app(scope, receive, to_client))
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            is_cancelled = True
            await asyncio.wait((serving,), timeout=GRACE_SECONDS)
            serving.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await serving  # nobody is left to tell
            raise
