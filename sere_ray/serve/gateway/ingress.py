"""The HTTP side: OpenAI routes and the control API behind the access layer.

Two ways lead to the engines. Behind Ray's proxy :class:`SereIngress` takes a request and hands it
to a replica. Where Ray streams directly, the engine's own server answers. :func:`protect` puts the
access layer around either.
"""

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

from fastapi.middleware.cors import CORSMiddleware
from ray import serve
from ray.exceptions import RayActorError
from ray.llm._internal.serve.constants import RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.ingress import ingress as ray_ingress
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.llm import build_llm_deployment, build_openai_app
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from sere_ray.observe.export import RaySink
from sere_ray.observe.metrics import REFUSED
from sere_ray.proxy.limits import SECRET, Limits
from sere_ray.serve.config import ServeConfig
from sere_ray.serve.gateway.access import AccessConfig, AccessLayer
from sere_ray.serve.gateway.control_api import REPORTED, control_app
from sere_ray.serve.gateway.hang_ups import HangUpLayer
from sere_ray.serve.gateway.keys import KeyFile, KeyRing, digest, from_environment
from sere_ray.serve.gateway.losses import EngineLostError, LossLayer, loss_event, lost, nobody
from sere_ray.serve.gateway.refusals import Refusal, answer, http_error
from sere_ray.serve.gateway.time_limits import TimeLimitLayer
from sere_ray.serve.gateway.ui import PATHS
from sere_ray.util.errors import SereError

ROUTES = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
}
"""What is served of Ray's ingress: what is tested, and nothing else."""
SERVED = frozenset(
    {"/v1/models", "/v1/models/{model:path}", "/v1/completions", "/v1/chat/completions"}
)
"""The paths of ``ROUTES``, for a server that has routes of its own: those beside these may not know
the tiers, so they are dropped."""
ACCESS = "sere_access"
"""Key of ``LLMConfig.experimental_configs`` that holds the arguments of :func:`protect`."""
QUEUE_CHECK_SECONDS = 1.0
"""How often a request that waits for a replica asks whether one is left."""


def ingress_app(config: ServeConfig, llm: Any) -> Any:
    """The Serve application of a deployment: its ingress, bound to the engines.

    Where Ray streams directly, there is no ingress of ours: the engine's own server answers, and
    the replica protects it.

    Args:
        config: of the deployment.
        llm: Ray's ``LLMConfig`` of the engines.

    Raises:
        SereError: the key file is not valid, or a proxy would hide who asks while nobody has a key.
    """
    keys = from_environment()
    ring = KeyRing(config.access.keys_file, keys)
    behind_haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    loopback = os.environ.get(SECRET) if behind_haproxy else None
    if ring.is_open and behind_haproxy and loopback is None:
        raise SereError(
            "access.keys_file is missing: behind HAProxy (RAY_SERVE_ENABLE_HA_PROXY=1) every "
            "client looks local; give keys (`sere-ray key NAME`), or let `sere-ray serve` start it"
        )
    protection: dict[str, Any] = {
        "access": config.access,
        "keys": keys,
        "limits": config.limits,
        "control": config.sere is not None,
        "loopback": None if loopback is None else digest(loopback),
    }
    if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:
        llm.experimental_configs[ACCESS] = protection
        return build_openai_app({"llm_configs": [llm]})
    app = ray_ingress.init()
    # No page of another origin may talk to the server: browsers are no clients of it.
    app.user_middleware = [m for m in app.user_middleware if m.cls is not CORSMiddleware]
    protect(app, **protection)
    ingress = make_fastapi_ingress(SereIngress, endpoint_map=ROUTES, app=app)
    options = SereIngress.get_deployment_options([llm])
    if config.device == "cpu":  # of a laptop's two cores, too, something is left for the ranks
        options["ray_actor_options"] = {"num_cpus": 0.5}
    model_id = config.model_id
    return serve.deployment(ingress, **options).bind(
        llm_deployments={model_id: build_llm_deployment(llm)},
        model_cards={model_id: to_model_metadata(model_id, llm)},
    )


class RefusalCounter:
    """Counts answers with a status of 400 or more, as a metric of the process that answers.

    It is made where the application is built, and used in the replica that it is sent to: so the
    metric itself is made at the first answer.
    """

    def __init__(self) -> None:
        self._sink: RaySink | None = None

    def __call__(self, status: int) -> None:
        """Count an answer with this status."""
        if self._sink is None:
            self._sink = RaySink({"app": serve.get_replica_context().app_name})
            for known in REPORTED:
                self._sink.record(REFUSED, 0, status=str(known))
        if status >= 400:
            self._sink.record(REFUSED, 1, status=str(status))


def protect(
    app: Any,
    *,
    access: AccessConfig,
    keys: KeyFile,
    limits: Limits,
    control: bool,
    loopback: str | None = None,
    is_lost: Callable[[], bool] | None = None,
) -> None:
    """Put the access layer around an application, mount control API and page in it, and drop
    routes that are not served.

    Args:
        app: a FastAPI application; changed in place.
        access: limits and the key file.
        keys: those of the environment.
        limits: on the time of a request and its answer.
        control: whether there is a policy actor to control.
        loopback: hash of the word by which HAProxy tells requests of this machine; None = it is
            seen by the client's address.
        is_lost: says whether the engine that answers in this process is gone; None = the process
            has no engine.
    """
    app.add_exception_handler(HTTPException, http_error)
    app.router.routes[:] = [r for r in app.routes if getattr(r, "path", None) in SERVED]
    if control:
        app.mount("/sere", control_app())
    app.middleware_stack = None  # vLLM builds its application at once; Starlette does it again
    if is_lost is not None:
        app.add_middleware(HangUpLayer)
        app.add_middleware(LossLayer, is_lost=is_lost)
    public = PATHS if control else frozenset()
    count = RefusalCounter()
    app.add_middleware(
        AccessLayer, config=access, fixed=keys, public=public, count=count, loopback=loopback
    )
    app.add_middleware(TimeLimitLayer, limits=limits)


_CALLS: ContextVar[list[Any]] = ContextVar("calls")
"""Calls of replicas that belong to the request at hand."""
ray_ingress.DEFAULT_LLM_ROUTER_HTTP_TIMEOUT = None  # Ray's 600 s; ours is limits.answer_s


class SereIngress(OpenAiIngress):  # type: ignore[misc]
    """Ray's OpenAI ingress, with clear answers when a gang is lost, and ends that reach the engine.

    Ray answers 500 while a dead engine is noticed, lets requests wait without limit while no
    replica runs, cuts a stream off, and leaves the engine at work where a request is ended here.
    Here a request gets 503 at once, a stream ends with an error event, and the replica's call is
    cancelled with the request.
    """

    def _get_configured_serve_handle(self, model_id: str) -> Any:
        handle = super()._get_configured_serve_handle(model_id)
        calls = _CALLS.get(None)
        return handle if calls is None else _RecordedHandle(handle, calls)

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
        handle = super()._get_configured_serve_handle(model_id)
        if has_no_replica(handle):
            raise nobody()
        started = False
        calls: list[Any] = []
        _CALLS.set(calls)
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
        finally:
            for call in calls:
                call.cancel()  # does nothing to one that has ended


class _RecordedHandle:
    """A handle of Ray Serve's whose calls are put into a list."""

    def __init__(self, handle: Any, calls: list[Any]) -> None:
        self._handle, self._calls = handle, calls

    def __getattr__(self, method: str) -> "_RecordedHandle":
        return _RecordedHandle(getattr(self._handle, method), self._calls)

    def options(self, **options: Any) -> "_RecordedHandle":
        return _RecordedHandle(self._handle.options(**options), self._calls)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        call = self._handle.remote(*args, **kwargs)
        self._calls.append(call)
        return call


async def until_loss(events: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """The events of a stream, up to the one that tells of a lost engine.

    After it Ray would send ``[DONE]``, as if the answer were whole.
    """
    async for event in events:
        yield event
        if event == loss_event():
            return


def is_loss(error: Exception) -> bool:
    """Whether an error means that the engine is gone, not that the request is bad."""
    kinds = (EngineLostError, RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)
    return isinstance(error, kinds)


async def first_response(responses: AsyncIterator[Any], handle: Any) -> Any:
    """Wait for the first response to a request, but not for a gang that has yet to start.

    Ray drops a dead replica when it does not take a call. The request of that call would then wait
    until the next gang is up.

    Raises:
        Refusal: no replica is left, and the request is still in Ray's queue.
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
