"""What a client is told when the engine of its request is lost: one wording on every path.

vLLM answers 500 for an engine that died, and ends a stream with an event of its own and ``[DONE]``.
:class:`LossLayer` around its application puts the wording of this module in place of its own.
Behind Ray's proxy a whole replica may be gone: then the ingress says the same (``forward.py``).
"""

import logging
from collections.abc import Callable, MutableMapping
from typing import Any

from sere_ray.serve.gateway.refusals import App, Message, Receive, Refusal, Send, failed

logger = logging.getLogger("ray.serve")
_ERROR_EVENT = b'data: {"error"'


class EngineLostError(RuntimeError):
    """What a replica raises for other processes in place of vLLM's exceptions.

    To read one of those, Serve's controller would import all of vLLM.
    """


def lost() -> Refusal:
    """The refusal of a request whose engine was lost.

    A new one each time: an exception that is raised again keeps the frames of all its raises.
    """
    message = "The engine of this request was lost and restarts; send the request again."
    return Refusal(503, "engine_lost", message, {"retry-after": "5"})


def nobody() -> Refusal:
    """The refusal of a request that finds no running engine; a new one each time."""
    message = "No engine is running now; try again shortly."
    return Refusal(503, "no_engine", message, {"retry-after": "5"})


class LossLayer:
    """Pure ASGI middleware around a server that answers from one engine.

    Args:
        app: the server.
        is_lost: whether its engine is gone.
    """

    def __init__(self, app: App, *, is_lost: Callable[[], bool]) -> None:
        self._app, self._is_lost = app, is_lost

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request; what is said after the loss is dropped."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        has_begun = has_ended = False

        async def guarded(message: Message) -> None:
            nonlocal has_begun, has_ended
            if has_ended:
                return
            has_begun = True
            if _tells_of_failure(message) and self._is_lost():
                has_ended = True
                return await _tell_of_loss(message, send)
            await send(message)

        try:
            await self._app(scope, receive, guarded)
        except Exception:
            if has_begun:
                raise
            if not self._is_lost():
                logger.exception("sere-ray: vLLM failed at %s", scope["path"][:200])
            await (lost() if self._is_lost() else failed()).answer(send)


def _tells_of_failure(message: Message) -> bool:
    """Whether a server error begins here, or the error event of a stream."""
    if message["type"] == "http.response.start":
        return bool(message["status"] >= 500)
    return bool(message.get("body", b"").startswith(_ERROR_EVENT))


async def _tell_of_loss(message: Message, send: Send) -> None:
    if message["type"] == "http.response.start":
        return await lost().answer(send)
    await send({"type": "http.response.body", "body": lost().event()})
