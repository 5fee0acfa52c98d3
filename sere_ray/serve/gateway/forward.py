"""A request behind Ray's proxy goes on to vLLM's own HTTP application, in a replica.

So every path has vLLM's routes, checks and errors. The ingress sends the request as it came
(:class:`Forwarder`), the replica answers with what its application says, message by message
(:func:`answers`). Nothing of a body is interpreted on the way.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from sere_ray.proxy.limits import Limits
from sere_ray.serve.gateway.hang_ups import DISCONNECT, end_task
from sere_ray.serve.gateway.losses import EngineLostError, lost, nobody
from sere_ray.serve.gateway.messages import METHODS_WITH_BODY, begins_stream, replayed
from sere_ray.serve.gateway.refusals import App, Message, Receive, Send
from sere_ray.serve.gateway.time_limits import AnswerClock
from sere_ray.serve.gateway.waiting_room import WaitingRoom

PASSED = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string",
          "root_path", "headers", "client", "server")  # fmt: skip
"""What a replica is told of a request: fields of the ASGI scope that are data."""
QUEUE_CHECK_SECONDS = 1.0
"""How often a request that waits for a replica asks whether one is left."""


class Forwarder:
    """ASGI application of the ingress: the answers of a replica.

    Ray lets requests wait without limit while no replica runs, and cuts a stream off whose replica
    died. Here a request with a body waits for a while, then it gets 503, others at once; and a
    stream ends with an error event. Where the client or a limit gives up, the replica's call is
    cancelled.

    Args:
        handle: of the engines' deployment.
        limits: how many requests may wait for a replica, and how long.
    """

    def __init__(self, handle: Any, limits: Limits) -> None:
        self._handle = handle.options(stream=True)
        self._room = WaitingRoom(limits)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request.

        Raises:
            Refusal: no engine runs, or it was lost before it answered.
        """
        clock = AnswerClock.of(scope)
        body, deadline = b"", 0.0  # a question of how things are does not wait
        if scope["method"] in METHODS_WITH_BODY:
            body, deadline = await _whole_body(receive), self._room.deadline()
        if has_no_replica(self._handle):
            await self._wait_until(deadline, lambda: not has_no_replica(self._handle), clock)
        request = {name: scope[name] for name in PASSED if name in scope}
        call = self._handle.serve_http.remote(request, body)
        has_begun = is_whole = is_stream = False
        head: Message | None = None
        try:
            messages = await self._first_response(call, deadline, clock)
            while messages is not None:
                for message in messages:
                    if message["type"] == "http.response.start":
                        # Held until there is more: a replica that dies now leaves a refusal.
                        head, is_stream = message, begins_stream(message)
                        continue
                    if not has_begun and head is not None:
                        has_begun = True
                        await send(head)
                    await send(message)
                    is_whole = not message.get("more_body", False)
                messages = await anext(call, None)
        except Exception as error:
            if is_whole and is_loss(error):
                return
            if not is_loss(error) or (has_begun and not is_stream):
                raise
            if not has_begun:
                raise lost() from None
            await send({"type": "http.response.body", "body": lost().event()})
        finally:
            if not is_whole:
                call.cancel()

    async def _wait_until(
        self, deadline: float, is_over: Callable[[], bool], clock: AnswerClock
    ) -> None:
        """Wait until a replica runs, or whatever else ends the wait.

        Raises:
            Refusal: that was not in time, or too many wait.
        """
        with clock.stopped():
            if not await self._room.hold(deadline, is_over):
                raise nobody()

    async def _first_response(
        self, responses: AsyncIterator[Any], deadline: float, clock: AnswerClock
    ) -> Any:
        """Wait for the first response to a call, but not for long for a gang that has yet to start.

        Ray drops a dead replica when it does not take a call. That call waits in its queue then,
        until the next gang is up.

        Raises:
            Refusal: no replica came in time, or too many wait, and the call is still in the queue.
        """
        first = asyncio.ensure_future(anext(responses))

        def is_over() -> bool:
            return first.done() or not (has_no_replica(self._handle) and has_queue(self._handle))

        try:
            while not first.done():
                await asyncio.wait((first,), timeout=QUEUE_CHECK_SECONDS)
                if not is_over():
                    await self._wait_until(deadline, is_over, clock)
            return first.result()
        finally:
            first.cancel()


async def answers(app: App, scope: Mapping[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
    """What an application answers to one request: its messages, as many at a time as there are.

    Closed before its end, it tells the application that the client is gone.

    Args:
        app: acts on its cancellation (:class:`~sere_ray.serve.gateway.hang_ups.HangUpLayer`).
        scope: of the request, as :class:`Forwarder` passes it on.
        body: the whole of it.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    is_gone = asyncio.Event()

    async def until_gone() -> Message:
        await is_gone.wait()
        return DISCONNECT

    async def run() -> None:
        try:
            await app(dict(scope), replayed(body, until_gone), messages.put)
        finally:
            messages.put_nowait(None)

    serving = asyncio.ensure_future(run())
    try:
        ready: list[Message | None] = []
        while None not in ready:
            ready = [await messages.get()]
            while not messages.empty():
                ready.append(messages.get_nowait())
            if ready[0] is not None:
                yield [message for message in ready if message is not None]
        await serving
    finally:
        is_gone.set()
        await end_task(serving)


async def _whole_body(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def is_loss(error: Exception) -> bool:
    """Whether an error means that the engine is gone, not that the request is bad."""
    kinds = (EngineLostError, RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)
    return isinstance(error, kinds)


def has_no_replica(handle: Any) -> bool:
    """Whether the deployment behind a handle has been running and no replica of it is left."""
    requests = _request_router(handle)
    return requests is not None and not requests.curr_replicas


def has_queue(handle: Any) -> bool:
    """Whether a request waits for a replica to take it."""
    return bool(_request_router(handle)._pending_requests_by_id)


def _request_router(handle: Any) -> Any:
    """Ray's request router of a handle; None before the first replica.

    Reaches into the handle, as Ray's own ``broadcast`` does: there is no public way to ask.
    """
    router = getattr(handle, "_router", None)
    inner = getattr(router, "_asyncio_router", router)
    return getattr(inner, "request_router", None)
