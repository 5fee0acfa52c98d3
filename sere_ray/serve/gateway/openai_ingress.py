"""Ray's OpenAI ingress, with clear answers when a gang is lost.

Ray answers 500 while a dead engine is noticed, lets requests wait without limit while no replica
runs, and cuts a stream off. Here: 503 at once, and an error event at the end of a stream.
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.llm.ingress import OpenAiIngress
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sere_ray.serve.gateway.access import Refusal
from sere_ray.serve.gateway.losses import EngineLostError, loss_event, lost, nobody

QUEUE_CHECK_SECONDS = 1.0


class SereIngress(OpenAiIngress):  # type: ignore[misc]
    """See the module."""

    async def _process_llm_request(self, *args: Any, **kwargs: Any) -> Response:
        try:
            response: Response = await super()._process_llm_request(*args, **kwargs)
        except Refusal as refusal:
            return answer(refusal)
        if isinstance(response, StreamingResponse):
            response.body_iterator = until_loss(response.body_iterator)
        return response

    async def _get_response(self, *, body: Any, **kwargs: Any) -> AsyncIterator[Any]:
        model_id = await self._get_model_id(body.model)
        handle = self._get_configured_serve_handle(model_id)
        if has_no_replica(handle):
            raise nobody()
        started = False
        try:
            responses = super()._get_response(body=body, **kwargs)
            first = await first_response(responses, handle)
            started = True
            yield first
            async for response in responses:
                yield response
        except Refusal:
            raise
        except Exception as error:
            if not is_loss(error):
                raise
            if not started:
                raise lost() from None
            yield loss_event()


async def until_loss(events: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """The events of a stream. That of a loss is the last one: after it Ray would send ``[DONE]``,
    as if the answer were whole."""
    async for event in events:
        yield event
        if event == loss_event():
            return


def is_loss(error: Exception) -> bool:
    """Whether an error means that the engine is gone, not that the request is bad."""
    kinds = (EngineLostError, RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)
    return isinstance(error, kinds)


async def first_response(responses: AsyncIterator[Any], handle: Any) -> Any:
    """The first of ``responses``; of a request that finds no replica left, a refusal.

    A replica that died is dropped at the first call that it does not take. The request of that
    call would then wait for the next gang.

    Raises:
        Refusal: no replica is left.
    """
    first = asyncio.ensure_future(anext(responses))
    try:
        while not first.done():
            await asyncio.wait((first,), timeout=QUEUE_CHECK_SECONDS)
            if not first.done() and has_no_replica(handle) and has_queue(handle):
                raise nobody()
        return first.result()
    finally:
        first.cancel()


def has_no_replica(handle: Any) -> bool:
    """Whether the deployment behind a handle was running and no replica is left."""
    requests = _request_router(handle)
    return requests is not None and not requests.curr_replicas


def has_queue(handle: Any) -> bool:
    """Whether a request waits for a replica. (One that a replica has taken does not.)"""
    return bool(_request_router(handle)._pending_requests_by_id)


def _request_router(handle: Any) -> Any:
    """Ray's request router of a handle; None before the first replica.

    Reaches into the handle, as Ray's own ``broadcast`` does: there is no public way to ask.
    """
    router = getattr(handle, "_router", None)
    inner = getattr(router, "_asyncio_router", router)
    return getattr(inner, "request_router", None)


def answer(refusal: Refusal) -> Response:
    """A refusal as an answer."""
    return Response(refusal.body(), refusal.status, refusal.headers, "application/json")


async def http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors (no such path or model) in OpenAI's form."""
    assert isinstance(error, HTTPException)
    code = "not_found" if error.status_code == 404 else "http_error"
    return answer(Refusal(error.status_code, code, str(error.detail), error.headers))
