"""Fails when Ray changes under what we use of its private and alpha modules.

The ledger in ``sere_ray/serve/__init__.py`` says what that is and why. Here each test names one
part of it and what we count on: a name, parameters, a line of source. Nothing is started. That it
works as a whole, the tests of deployments show (``tests/live``, ``test_two_gangs.py``).
"""

import ast
import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
import ray
from ray import serve
from ray._private import node, worker
from ray.data import DataContext, Dataset
from ray.experimental import internal_kv
from ray.llm._internal.common.callbacks.base import CallbackBase, CallbackCtx
from ray.llm._internal.serve import constants as llm_constants
from ray.llm._internal.serve.core.configs.llm_config import LLMConfig as InternalConfig
from ray.llm._internal.serve.core.engine.protocol import LLMEngine
from ray.llm._internal.serve.core.ingress import builder
from ray.llm._internal.serve.core.server import llm_server
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve._private import constants, deployment_state, http_util, replica, router
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.request_router.request_router import RequestRouter
from ray.serve.config import DeploymentActorConfig, RequestRouterConfig
from ray.serve.context import DeploymentActorContext, ReplicaContext, _get_global_client
from ray.serve.experimental.round_robin_router import RoundRobinRouter
from ray.serve.gang import GangContext
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.llm import LLMConfig, build_llm_deployment, build_openai_app
from ray.serve.llm.deployment import DPServer, LLMServer
from ray.serve.request_router import RunningReplica
from ray.util import metrics

from sere_ray.proxy.limits import RAY_SWITCHES
from sere_ray.serve import way

PACKAGE = Path(__file__).parents[2] / "sere_ray"
PRIVATE = {
    "ray.experimental.internal_kv",
    "ray.llm._internal.common.callbacks.base.CallbackBase",
    "ray.llm._internal.serve.constants.RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING",
    "ray.llm._internal.serve.core.engine.protocol.LLMEngine",
    "ray.llm._internal.serve.core.server.llm_server",
    "ray.llm._internal.serve.engines.vllm.vllm_engine.VLLMEngine",
    "ray.serve.context._get_global_client",
}
"""What is imported of Ray's private and experimental modules; each has a test below."""
ALPHA = {
    "ray.serve.config.DeploymentActorConfig",
    "ray.serve.config.RequestRouterConfig",
    "ray.serve.llm.LLMConfig",
    "ray.serve.llm.build_llm_deployment",
    "ray.serve.llm.build_openai_app",
    "ray.serve.llm.deployment.DPServer",
    "ray.serve.llm.deployment.LLMServer",
}
"""What is imported of Ray's alpha modules; each has a test below."""


def relies(holds, on, found):
    """Fail with what we count on and what Ray has instead."""
    assert holds, (
        f"Ray {ray.__version__} has changed: sere-ray relies on {on}, "
        f"found {found}. Who uses it and why: the ledger in sere_ray/serve/__init__.py."
    )


def takes(function, *names):
    """Parameters are there, the positional ones in this order, and none without default beside."""
    found = inspect.signature(function).parameters
    required = [
        name
        for name, each in found.items()
        if each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]
    holds = set(required) <= set(names) <= set(found)
    in_order = [name for name in found if name in names] == list(names)
    relies(holds and in_order, f"{function.__qualname__}({', '.join(names)})", list(found))


def does(function, *lines):
    """These pieces of source are there, in this order."""
    text, at = inspect.getsource(function), 0
    for line in lines:
        at = text.find(line, at)
        name = getattr(function, "__qualname__", function.__name__)
        relies(at >= 0, f"{name} containing {line!r} (in the order {lines})", "no such line")
        at += len(line)


def has(owner, *names):
    """An object, or the fields of a pydantic model, have these names."""
    fields = getattr(owner, "model_fields", {})
    for name in names:
        relies(name in fields or hasattr(owner, name), f"{owner.__name__}.{name}", "no such name")


def is_async(function):
    relies(inspect.iscoroutinefunction(function), f"async {function.__qualname__}", "no coroutine")


# --- this file and the ledger speak of all there is -----------------------------------------------


def imported():
    for path in PACKAGE.rglob("*.py"):
        for each in ast.walk(ast.parse(path.read_text())):
            if isinstance(each, ast.ImportFrom) and each.module and not each.level:
                yield from (f"{each.module}.{alias.name}" for alias in each.names)
            elif isinstance(each, ast.Import):
                yield from (alias.name for alias in each.names)


def test_every_private_and_alpha_import_has_a_test():
    names = {name for name in imported() if name.split(".")[0] == "ray"}
    private = {n for n in names if "._" in n or n.startswith("ray.experimental")}
    assert private == PRIVATE
    alpha = ("ray.serve.llm.", "ray.serve.config.")
    assert {n for n in names if n.startswith(alpha)} == ALPHA
    tests = Path(__file__).read_text().partition("# --- the engine of a replica")[2]
    for name in PRIVATE | ALPHA:
        assert name.rpartition(".")[2] in tests, name


def test_the_ledger_names_who_uses_it():
    ledger = (PACKAGE / "serve" / "__init__.py").read_text()
    for name in PRIVATE | ALPHA - {"ray.serve.llm.LLMConfig"}:
        last = name.rpartition(".")[2]
        covered = {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "RAY_SERVE_..."}.get(last, last)
        builders = ("build_llm_deployment", "build_openai_app")
        assert covered in ledger or last in builders, name


def test_a_failure_says_what_has_changed():
    def changed(self, other):
        return other

    with pytest.raises(AssertionError, match=r"Ray .* relies on .*changed\(self, body\), found"):
        takes(changed, "self", "body")
    with pytest.raises(AssertionError, match=r"relies on .*changed containing 'return body'"):
        does(changed, "return body")
    with pytest.raises(AssertionError, match=r"relies on GangContext\.gone, found no such name"):
        has(GangContext, "gone")


# --- the engine of a replica: replica/engine.py ---------------------------------------------------


def test_an_engine_is_started_by_a_method_of_its_own():
    takes(
        VLLMEngine._start_async_llm_engine,
        "self",
        "vllm_engine_args",
        "vllm_engine_config",
        "placement_group",
    )
    does(
        VLLMEngine.start,
        "self._engine_client = self._start_async_llm_engine(",
        "vllm_engine_args,",
        "vllm_engine_config,",
        "callback.ctx.placement_group,",
    )
    # `compute_in_engine_process` has changed the configuration by then.
    does(VLLMEngine._start_async_llm_engine, "Executor.get_class(vllm_engine_config)", "AsyncLLM")


def test_a_loss_is_seen_by_the_engines_client():
    does(VLLMEngine.__init__, "self._engine_client = None")
    from vllm.v1.engine.async_llm import AsyncLLM

    relies(isinstance(AsyncLLM.errored, property), "AsyncLLM.errored", "no property")


def test_an_engine_makes_vllms_application():
    takes(VLLMEngine.build_asgi_app, "self")
    is_async(VLLMEngine.build_asgi_app)
    does(VLLMEngine.build_asgi_app, "app = build_app(", "app.state._state.update(", "return app")
    has(LLMEngine, "build_asgi_app")


def test_workers_are_called_through_the_engine():
    takes(VLLMEngine.collective_rpc, "self", "method", "timeout", "args", "kwargs")
    does(VLLMEngine.collective_rpc, "await self._engine_client.collective_rpc(")


def test_what_a_stand_in_engine_has_to_have():
    """`StandInEngine`: a new abstract method would keep it from being made."""
    from sere_ray.bench.stand_in_engine import StandInEngine

    missing = set(LLMEngine.__abstractmethods__) & set(StandInEngine.__abstractmethods__)
    relies(not missing, "no abstract method of LLMEngine beside those of StandInEngine", missing)


def test_what_ray_imports_of_vllm_is_there():
    """Of the module of its engine. vLLM 0.33 lacks one: `app.check_vllm_of_ray` refuses it."""
    tree = ast.parse(Path(inspect.getfile(VLLMEngine)).read_text())
    used = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    used = {name for name in used if name.split(".")[0] == "vllm"}
    missing = {name for name in used if find_spec(name) is None}
    relies("vllm.entrypoints.launchers.cli_args" in used, "Ray importing as vLLM 0.32 has it", used)
    relies(not missing, "Ray and the pinned vLLM fitting together", missing)


# --- a replica: replica/server.py -----------------------------------------------------------------


@pytest.mark.parametrize("server", [LLMServer, DPServer])
def test_a_server_makes_its_engine_and_starts_it_in_start(server):
    takes(server.__init__, "self", "llm_config", "engine_cls", "model_downloader")
    for method in (server.start, server.check_health, server.__del__):
        takes(method, "self")
        is_async(method)
    does(llm_server.LLMServer.__init__, "self._init_shared(", "await self.start()")
    does(
        llm_server.LLMServer._init_shared,
        "self._llm_config = llm_config",
        "self._get_default_engine_class()",
    )
    does(llm_server.LLMServer._get_default_engine_class, "return self._default_engine_cls")
    does(llm_server.LLMServer.start, "self.engine = self._engine_cls(self._llm_config)")
    does(llm_server.LLMServer.check_health, "await self.engine.check_health()")
    takes(server.get_deployment_options, "llm_config")


@pytest.mark.parametrize("server", [LLMServer, DPServer])
def test_a_started_engine_is_told_to_telemetry_and_no_more(server):
    """What ``_start_engine`` of our servers does in other words."""
    lines = [line.strip() for line in inspect.getsource(server._start_engine).splitlines()]
    statements = [line for line in lines if line and not line.startswith(("#", '"'))]
    expected = [
        "async def _start_engine(self):",
        "if self.engine is None:",
        'raise ValueError("Engine is not set")',
        "await self.engine.start()",
        "push_telemetry_report_for_all_models(all_models=[self._llm_config])",
        "if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:",
        'record_extra_usage_tag(TagKey.LLM_SERVE_DIRECT_STREAMING_ENABLED, "1")',
    ]
    relies(statements == expected, "LLMServer._start_engine as it is", statements)
    takes(llm_server.push_telemetry_report_for_all_models, "all_models")


def test_a_rank_of_a_gang_is_numbered_before_it_starts():
    """`data_parallel_rank` is in `engine_kwargs` when ours adds the policy to them."""
    does(DPServer.__init__, "llm_config.update_engine_kwargs(", "await super().__init__(")
    does(InternalConfig.update_engine_kwargs, "self.engine_kwargs.update(kwargs)")


def test_a_replica_is_ended_by_its_destructor():
    """The follower leaves its gang there, as Serve awaits it."""
    does(
        replica.UserCallableWrapper.call_destructor,
        "await self._call_func_or_gen(",
        "self._callable.__del__,",
    )


def test_direct_streaming_asks_a_replica_for_its_routes():
    build = llm_server.LLMServer.__serve_build_asgi_app__
    takes(build, "self")
    is_async(build)
    # Ours does the same, without the layer that loads adapters by a header.
    does(
        build,
        "app = await self.engine.build_asgi_app()",
        "_ResolveLoRAMiddleware",
        "_add_openai_models_retrieve_route(",
        "return app",
    )
    name = replica.SERVE_BUILD_ASGI_APP_METHOD
    relies(name == "__serve_build_asgi_app__", "Serve calling __serve_build_asgi_app__", name)


def test_a_callback_may_keep_ray_from_downloading():
    takes(CallbackBase.__init__, "self", "llm_config", "raise_error_on_callback", "ctx_kwargs")
    does(CallbackBase.__init__, "self.llm_config = llm_config", "self.ctx = CallbackCtx(")
    is_async(CallbackBase.on_before_node_init)
    relies(CallbackCtx().run_init_node is True, "CallbackCtx.run_init_node = True", "another")
    does(
        VLLMEngine.start,
        'await callback.run_callback("on_before_node_init")',
        "if callback.ctx.run_init_node:",
        "await initialize_node(",
    )


def test_the_description_of_engines_has_the_keys_that_are_set():
    """`app.llm_config` sets them; Ray's model refuses unknown keys, and takes their values."""
    has(
        LLMConfig,
        "model_loading_config",
        "accelerator_config",
        "placement_group_config",
        "deployment_config",
        "server_cls",
        "engine_kwargs",
        "experimental_configs",
        "callback_config",
        "runtime_env",
        "log_engine_metrics",
    )
    does(
        llm_server.LLMServer._get_batch_interval_ms,
        'experimental_configs.get(\n            "stream_batching_interval_ms"',
    )


# --- the policy actor: policy_actor/, replica/follower.py -----------------------------------------


def test_a_deployment_has_an_actor():
    has(DeploymentActorConfig, "name", "actor_class", "init_kwargs")
    takes(serve.get_deployment_actor, "actor_name")
    takes(serve.get_deployment_actor_context)
    has(DeploymentActorContext, "app_name")
    found = inspect.signature(serve.deployment).parameters
    relies("deployment_actors" in found, "serve.deployment(deployment_actors=)", list(found))


def test_a_replica_knows_its_gang():
    relies("gang_context" in ReplicaContext.__dataclass_fields__, "gang_context", "none")
    relies("replica_id" in ReplicaContext.__dataclass_fields__, "replica_id", "none")
    has(ReplicaContext, "app_name")
    fields = set(GangContext.__dataclass_fields__)
    relies({"gang_id", "rank", "world_size"} <= fields, "gang_id, rank, world_size", fields)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_internal_kv_get", ["key", "namespace"]),
        ("_internal_kv_put", ["key", "value", "namespace"]),
        ("_internal_kv_del", ["key", "namespace"]),
        ("_internal_kv_list", ["prefix", "namespace"]),
    ],
)
def test_the_clusters_store(name, arguments):
    has(internal_kv, name)
    takes(getattr(internal_kv, name), *arguments)


# --- the HTTP side: gateway/ingress.py, run.py ----------------------------------------------------


def test_an_ingress_makes_its_application_in_the_replica():
    found = inspect.signature(serve.ingress).parameters["app"]
    relies(found.default is None, "serve.ingress() without an application", found)
    does(serve.ingress, "__serve_build_asgi_app__")


def test_a_call_of_a_replica_can_be_cancelled():
    takes(DeploymentResponseGenerator.cancel, "self")
    has(DeploymentResponseGenerator, "__anext__")


def test_the_proxies_take_our_limits():
    """`tests/proxy` has HAProxy's configuration; here is what leads there."""
    import uvicorn.config
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    does(http_util.configure_http_middlewares, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH")
    does(http_util.start_asgi_http_server, "uvicorn.Config(")
    relies("auto" in uvicorn.config.HTTP_PROTOCOLS, "uvicorn's HTTP_PROTOCOLS['auto']", "none")
    for name in ("connection_made", "connection_lost", "data_received"):
        has(AutoHTTPProtocol, name)
    does(http_util.parse_request_timeout_header, "SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER")
    for name in RAY_SWITCHES:
        text = inspect.getsource(constants)
        relies(f'"{name}"' in text, f"the header {name}", "another name")


def test_the_first_replica_that_fails_is_told():
    from sere_ray.serve.failed_start import FAILED

    text = inspect.getsource(deployment_state)
    for what in ("A replica", "A deployment actor"):
        relies(f"{what} {FAILED}" in text, f"the message '{what} {FAILED}'", "none")


def test_a_start_can_wait_itself():
    waits = ("wait_for_ingress_deployment_creation", "wait_for_applications_running")
    takes(serve.run_many, "targets", *waits)
    takes(serve.RunTarget, "target", "name", "route_prefix")
    does(_get_global_client, "return _global_client")
    takes(ServeControllerClient.wait_for_proxies_serving, "self")


def test_an_application_is_built_of_these():
    found = list(inspect.signature(build_llm_deployment).parameters)
    relies(found[0] == "llm_config", "build_llm_deployment(llm_config)", found)
    takes(build_openai_app, "llm_serving_args")
    does(builder.build_openai_app, "if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:")


def test_direct_streaming_is_chosen_by_the_environment_at_import():
    name, text = "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING", inspect.getsource(llm_constants)
    relies(f'os.environ.get("{name}", "0") == "1"' in text, f"{name} = 1", "another reading")
    text = inspect.getsource(constants)
    for name in (
        "RAY_SERVE_ENABLE_HA_PROXY",
        *way.PORTS,
        *way.FILES,
        "RAY_SERVE_HAPROXY_BINARY_PATH",
        way.CALLBACK_VARIABLE,
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
    ):
        relies(f'"{name}"' in text, f"the variable {name}", "nobody who reads it")


def test_a_handle_tells_whether_a_replica_is_left():
    does(DeploymentHandle.__init__, "self._router: Optional[Router] = _router")
    for kind in (router.SingletonThreadRouter, router.CurrentLoopRouter):
        does(kind.__init__, "self._asyncio_router = AsyncioRouter(")
    found = router.AsyncioRouter.request_router
    relies(isinstance(found, property), "AsyncioRouter.request_router", type(found))
    does(router.AsyncioRouter.__init__, "self._request_router: Optional[RequestRouter] =")
    found = RequestRouter.curr_replicas
    relies(isinstance(found, property), "RequestRouter.curr_replicas", type(found))
    does(RequestRouter.__init__, "self._pending_requests_by_id: Dict[str, PendingRequest] = {}")


# --- requests placed by their experts: by_experts/ ------------------------------------------------


def test_a_request_router_is_asked_for_replicas():
    for kind in (RequestRouter, RoundRobinRouter, RequestRouterConfig().get_request_router_class()):
        takes(kind.choose_replicas, "self", "candidate_replicas", "pending_request")
        is_async(kind.choose_replicas)
    takes(RequestRouter.on_request_routed, "self", "pending_request", "replica_id", "result")
    has(RunningReplica, "replica_id", "routing_stats", "max_ongoing_requests")
    has(RequestRouter, "replica_queue_len_cache")
    does(router.AsyncioRouter.request_router.fget, "request_router.initialize_state(")
    # Each request gets the replica that was chosen for it, not the next in a queue.
    does(RequestRouter._fulfill_next_pending_request, "_matching_internal_request_id(")


def test_rays_ingress_request_router_asks_ours_and_shows_it_the_request():
    from ray.llm._internal.serve.core.ingress.router import LLMRouter

    does(LLMRouter._pick_replica, "(routing_payload,)", '"_reserve": False', ".choose_replica(")
    does(
        router.AsyncioRouter.choose_replica,
        "args=list(request_args)",
        "_choose_replicas_with_backoff(",
        "__anext__())[0]",
    )
    does(builder._get_direct_streaming_serve_options, "not in llm_config.deployment_config")
    text = inspect.getsource(constants)
    for name in way.BODIES:
        relies(f'"{name}"' in text, f"the variable {name}", "nobody who reads it")


def test_replicas_tell_request_routers_what_they_are_asked():
    takes(llm_server.LLMServer.record_routing_stats, "self")
    is_async(llm_server.LLMServer.record_routing_stats)
    has(RequestRouterConfig, "request_router_class", "request_routing_stats_period_s")


# --- other rooms ----------------------------------------------------------------------------------


def test_a_metric_records_zero():
    takes(metrics.Metric._record, "self", "value", "tags")
    does(metrics.Counter.inc, "if value <= 0:")  # else `inc` itself would do


def test_an_instance_of_our_own():
    does(worker.init, '_metrics_export_port: Optional[int] = kwargs.pop("_metrics_export_port"')
    relies("timed out during startup" in inspect.getsource(node), "that text of an error", "none")


def test_restarts_of_workers_are_bounded():
    found = inspect.signature(Dataset.map_batches).parameters
    relies("ray_remote_args_fn" in found, "map_batches(ray_remote_args_fn=)", list(found))
    relies(
        "max_consecutive_actor_init_deaths" in DataContext.__dataclass_fields__,
        "DataContext.max_consecutive_actor_init_deaths",
        "no such field",
    )
