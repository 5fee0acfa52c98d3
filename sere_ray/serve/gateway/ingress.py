"""The HTTP side: vLLM's OpenAI routes and the control API behind the access layer.

Two ways lead to the engines, and both end in vLLM's own application, cut to what is served
(:func:`engine_app`). Behind Ray's proxy :class:`SereIngress` hands a request on to a replica. Where
Ray streams directly, the replica's own server answers. :func:`protect` puts the access layer around
either.
"""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from ray import serve
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse
from starlette.routing import Mount

from sere_ray.observe.export import RaySink
from sere_ray.observe.metrics import REFUSED
from sere_ray.proxy.limits import Limits
from sere_ray.serve.gateway.access import AccessConfig, AccessLayer
from sere_ray.serve.gateway.control_api import REPORTED, control_app
from sere_ray.serve.gateway.forward import Forwarder
from sere_ray.serve.gateway.hang_ups import HangUpLayer
from sere_ray.serve.gateway.keys import KeyFile
from sere_ray.serve.gateway.losses import LossLayer
from sere_ray.serve.gateway.refusals import http_error
from sere_ray.serve.gateway.routes import MODELS, SERVED
from sere_ray.serve.gateway.time_limits import TimeLimitLayer
from sere_ray.serve.gateway.ui import PATHS

ACCESS = "sere_access"
"""Key of ``LLMConfig.experimental_configs`` that holds the arguments of :func:`protect`."""


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
        forwarder = Forwarder(self._engines, self._protection["limits"])
        app = Starlette(routes=[Mount("/", forwarder)])
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
