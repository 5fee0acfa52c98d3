"""The HTTP side: vLLM's OpenAI routes and the control API behind the access layer.

Two ways lead to the engines, and both end in vLLM's own application, cut to what is served
(:func:`engine_app`). Behind Ray's proxy :class:`SereIngress` hands a request on to a replica. Where
Ray streams directly, the replica's own server answers. :func:`protect` puts the access layer around
either.
"""

import os
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from ray import serve
from ray.llm._internal.serve.constants import RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING
from ray.serve.llm import build_llm_deployment, build_openai_app
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse
from starlette.routing import Mount

from sere_ray.observe.export import RaySink
from sere_ray.observe.metrics import REFUSED
from sere_ray.proxy.limits import SECRET, Limits
from sere_ray.serve.by_experts.router import ray_options
from sere_ray.serve.config import ServeConfig
from sere_ray.serve.gateway.access import AccessConfig, AccessLayer
from sere_ray.serve.gateway.control_api import REPORTED, control_app
from sere_ray.serve.gateway.forward import Forwarder
from sere_ray.serve.gateway.hang_ups import HangUpLayer
from sere_ray.serve.gateway.keys import KeyFile, KeyRing, digest, from_environment
from sere_ray.serve.gateway.losses import LossLayer
from sere_ray.serve.gateway.refusals import http_error
from sere_ray.serve.gateway.routes import MODELS, SERVED
from sere_ray.serve.gateway.time_limits import TimeLimitLayer
from sere_ray.serve.gateway.ui import PATHS
from sere_ray.util.errors import SereError

ACCESS = "sere_access"
"""Key of ``LLMConfig.experimental_configs`` that holds the arguments of :func:`protect`."""
NO_LIMIT = 1_000_000
"""Requests that Serve lets into one process: the access layer has limits of its own, and says so to
a client, where Serve would let it wait."""


def ingress_app(config: ServeConfig, llm: Any) -> Any:
    """The Serve application of a deployment: its ingress, bound to the engines.

    Where Ray streams directly, there is no ingress of ours: the engine's own server answers, and
    the replica protects it.

    Args:
        config: of the deployment.
        llm: Ray's ``LLMConfig`` of the engines.

    Raises:
        SereError: the key file is not valid, a proxy would hide who asks while nobody has a key, or
            a request router would see nothing of what is asked.
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
    if config.request_router == "experts":
        llm.deployment_config |= ray_options(is_direct=RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING)
    if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:
        llm.experimental_configs[ACCESS] = protection
        return build_openai_app({"llm_configs": [llm]})
    options: dict[str, Any] = {"name": SereIngress.__name__, "max_ongoing_requests": NO_LIMIT}
    if config.device == "cpu":  # of a laptop's two cores, too, something is left for the ranks
        options["ray_actor_options"] = {"num_cpus": 0.5}
    ingress = serve.deployment(serve.ingress()(SereIngress), **options)
    return ingress.bind(build_llm_deployment(llm), protection)


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


class SereIngress:
    """The ingress behind Ray's proxy.

    Args:
        engines: handle of their deployment.
        protection: arguments of :func:`protect`.
    """

    def __init__(self, engines: Any, protection: dict[str, Any]) -> None:
        self._engines, self._protection = engines, protection

    async def __serve_build_asgi_app__(self) -> Starlette:
        app = Starlette(routes=[Mount("/", Forwarder(self._engines))])
        protect(app, **self._protection)
        return app


def engine_app(app: FastAPI, model_id: str, *, is_lost: Callable[[], bool]) -> FastAPI:
    """Cut vLLM's application to what is served, and let it word a loss as we do.

    Args:
        app: of vLLM; changed in place.
        model_id: of the only model, for OpenAI's ``GET /v1/models/{id}``, which vLLM has not.
        is_lost: says whether the engine is gone.
    """
    app.router.routes[:] = [r for r in app.routes if getattr(r, "path", None) in SERVED]
    app.add_exception_handler(HTTPException, http_error)
    _add_model_route(app, model_id)
    app.middleware_stack = None  # vLLM builds its application at once; Starlette does it again
    # Which pages of other origins may ask is a matter of the access layer.
    layers: list[Any] = app.user_middleware
    app.user_middleware = [layer for layer in layers if layer.cls is not CORSMiddleware]
    app.add_middleware(HangUpLayer)
    app.add_middleware(LossLayer, is_lost=is_lost)
    return app


def _add_model_route(app: FastAPI, model_id: str) -> None:
    @app.get(MODELS + "/{model:path}")
    async def retrieve(model: str) -> Any:
        if not model:
            return RedirectResponse(MODELS)
        if model != model_id:
            raise HTTPException(404, f"The model {model[:200]!r} does not exist.")
        models = await app.state.openai_serving_models.show_available_models()
        return next(card for card in models.data if card.id == model_id)


def protect(
    app: Starlette,
    *,
    access: AccessConfig,
    keys: KeyFile,
    limits: Limits,
    control: bool,
    loopback: str | None = None,
) -> None:
    """Put the access layer around an application, and mount control API and page in it.

    Args:
        app: changed in place.
        access: limits and the key file.
        keys: those of the environment.
        limits: on the time of a request and its answer.
        control: whether there is a policy actor to control.
        loopback: hash of the word by which HAProxy tells requests of this machine; None = it is
            seen by the client's address.
    """
    if control:
        app.router.routes.insert(0, Mount("/sere", control_app()))
    app.middleware_stack = None
    app.add_middleware(
        AccessLayer,
        config=access,
        fixed=keys,
        public=PATHS if control else frozenset(),
        count=RefusalCounter(),
        loopback=loopback,
    )
    app.add_middleware(TimeLimitLayer, limits=limits)
