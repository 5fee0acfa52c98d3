"""The HTTP side: OpenAI routes and the control API behind the access layer."""

import os
from collections.abc import Callable
from typing import Any

from fastapi.middleware.cors import CORSMiddleware
from ray import serve
from ray.llm._internal.serve.constants import RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.ingress.ingress import init
from ray.serve.llm import build_llm_deployment, build_openai_app
from ray.serve.llm.ingress import make_fastapi_ingress
from starlette.exceptions import HTTPException

from sere_ray.observe.metrics import REFUSED
from sere_ray.observe.sink import RaySink
from sere_ray.serve.config import ServeConfig
from sere_ray.serve.gateway.access import AccessConfig, AccessLayer
from sere_ray.serve.gateway.control_api import REPORTED, control_app
from sere_ray.serve.gateway.hang_ups import HangUpLayer
from sere_ray.serve.gateway.keys import KeyFile, KeyRing, from_environment
from sere_ray.serve.gateway.losses import LossLayer
from sere_ray.serve.gateway.openai_ingress import SereIngress, http_error
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
"""The same as paths, for a server that has its own routes. Others could know no tiers."""
ACCESS = "sere_access"
"""Key of ``LLMConfig.experimental_configs`` that holds the arguments of :func:`protect`."""


def ingress_app(config: ServeConfig, llm: Any) -> Any:
    """The application.

    Where Ray streams directly, the engine's own server answers and is protected there.

    Raises:
        SereError: the key file is not valid, or a proxy would hide who asks while nobody has a key.
    """
    keys = from_environment()
    ring = KeyRing(config.access.keys_file, keys)
    if ring.is_open and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise SereError(
            "access.keys_file is missing: behind HAProxy (RAY_SERVE_ENABLE_HA_PROXY=1) every "
            "client looks local; give keys (`sere-ray key NAME`)"
        )
    if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:
        llm.experimental_configs[ACCESS] = (config.access, keys, config.sere is not None)
        return build_openai_app({"llm_configs": [llm]})
    app = init()
    # No page of another origin may talk to the server: browsers are no clients of it.
    app.user_middleware = [m for m in app.user_middleware if m.cls is not CORSMiddleware]
    protect(app, config.access, keys, control=config.sere is not None)
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

    It is made where the application is built and used in the replica that it is sent to.
    """

    def __init__(self) -> None:
        self._sink: RaySink | None = None

    def __call__(self, status: int) -> None:
        """Take note of an answer."""
        if self._sink is None:
            self._sink = RaySink({"app": serve.get_replica_context().app_name})
            for known in REPORTED:
                self._sink.record(REFUSED, 0, status=str(known))
        if status >= 400:
            self._sink.record(REFUSED, 1, status=str(status))


def protect(
    app: Any,
    access: AccessConfig,
    keys: KeyFile,
    *,
    control: bool,
    is_lost: Callable[[], bool] | None = None,
) -> None:
    """Put the access layer around a FastAPI application, mount control API and page in it, and
    drop routes that are not served.

    Args:
        app: changed in place.
        access: limits and the key file.
        keys: of the environment.
        control: whether there is a router actor to control.
        is_lost: whether the engine that answers in this process is gone; None = there is none.
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
    app.add_middleware(AccessLayer, config=access, fixed=keys, public=public, count=count)
