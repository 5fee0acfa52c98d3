"""What a client is told when the engine of its request is lost: one wording on every path.

vLLM answers 500 for an engine that died, and ends a stream with an event of its own and ``[DONE]``.
Behind Ray's proxy a replica raises instead (:func:`raise_at_loss`), and the ingress says what is
said here (``ingress.py``). Where Ray streams directly, vLLM's own server
answers, and :class:`LossLayer` puts the wording of this module in place of its own.
"""

from collections.abc import AsyncIterable, AsyncIterator, Callable, MutableMapping
from typing import Any

from sere_ray.engine.vllm_internals import engine_dead_error
from sere_ray.serve.gateway.refusals import App, Message, Receive, Refusal, Send

_ERROR_EVENT = 'data: {"error"'


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


def loss_event() -> str:
    """The last event of a stream whose engine was lost."""
    return f"data: {lost().body().decode()}\n\n"


async def raise_at_loss(
    responses: AsyncIterable[Any], is_lost: Callable[[], bool]
) -> AsyncIterator[Any]:
    """What an engine answers; an exception in place of the event with which vLLM ends a stream.

    Raises:
        EngineLostError: the engine is gone.
    """
    dead = engine_dead_error()
    try:
        async for response in responses:
            if isinstance(response, str) and response.startswith(_ERROR_EVENT) and is_lost():
                raise dead
            yield response
    except dead as error:
        raise EngineLostError(str(error)) from None


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
        has_ended = False

        async def guarded(message: Message) -> None:
            nonlocal has_ended
            if has_ended:
                return
            if _tells_of_failure(message) and self._is_lost():
                has_ended = True
                return await _tell_of_loss(message, send)
            await send(message)

        await self._app(scope, receive, guarded)


def _tells_of_failure(message: Message) -> bool:
    """Whether a server error begins here, or the error event of a stream."""
    if message["type"] == "http.response.start":
        return bool(message["status"] >= 500)
    return bool(message.get("body", b"").startswith(_ERROR_EVENT.encode()))


async def _tell_of_loss(message: Message, send: Send) -> None:
    if message["type"] == "http.response.start":
        return await lost().answer(send)
    await send({"type": "http.response.body", "body": loss_event().encode()})
