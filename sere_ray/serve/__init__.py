"""The Ray Serve application: OpenAI routes in front of vLLM engines that re-route.

The ledger of what this package uses of Ray beyond its stable API (alpha, experimental and private
names). ``tests/serve/test_drift_of_ray.py`` fails when one of them changes:

=====================================  ==========================================================
target, and who uses it                what, why, remove when
=====================================  ==========================================================
VLLMEngine                             ``_start_async_llm_engine``: compute in the engine process.
``replica/engine.py``                  ``_engine_client``: see a loss. ``build_asgi_app``: vLLM's
                                       own routes on every way. Remove: Ray takes an executor, and
                                       tells of a dead engine.
vLLM below 0.33                        Ray 2.60 imports ``vllm.entrypoints.launchers.cli_args``,
``app.py``                             which 0.33 lacks: refused. Remove: a Ray that runs with 0.33.
LLMEngine                              Base of the benchmarks' stand-in engine. Remove: Ray
``replica/engine.py``                  publishes it.
LLMServer, DPServer                    A replica asks the policy actor before it starts, follows it
``replica/server.py``                  then, and leaves it at its end: ``start``, ``check_health``,
                                       ``__del__``. ``__serve_build_asgi_app__``: access layer in
                                       front of direct streaming, and the ingress of Ray's proxy
                                       (``gateway/ingress.py``). Remove: hooks for these four.
RequestRouter, RoundRobinRouter,       Requests placed by their experts: ``choose_replicas``, and
RequestRouterConfig                    ``routing_stats`` of replicas. Where something is missing,
``by_experts/router.py``               Ray's own two decide. Remove: never; they are alpha.
CallbackBase                           ``ctx.run_init_node = False`` where nothing is to be
``replica/server.py``                  downloaded. Remove: Ray sees that itself.
DeploymentActorConfig,                 The policy actor lives as long as its deployment. Remove:
get_deployment_actor(_context)         never; they are alpha, so their form may change.
``replica/``, ``policy_actor/``
llm_server                             ``_start_engine``: telemetry is sent in the background.
``replica/server.py``                  Remove: Ray does not wait for it.
HAProxy's configuration, uvicorn's     Limits that Ray has no option for are written into the first
AutoHTTPProtocol                       (``RAY_SERVE_HAPROXY_BINARY_PATH``), timed in the second.
``proxy/``                             Remove: Ray takes them.
Text of ``serve.status()``             "failed to start": a start ends at the first replica's
``failed_start.py``                    failure. Remove: Serve has a state for it.
run_many, _get_global_client           A start that asks how things are waits itself; then the
``run.py``                             proxies must know it. Remove: ``serve.run`` sees failures.
handle._router                         Whether a replica is left, and who waits for one. Remove: a
``gateway/forward.py``                 handle tells how many replicas it has.
RAY_SERVE_..., HAProxy                 Direct streaming is chosen by environment, before Ray is
``application.py``, ``way.py``         imported; ports that are free. Remove: options of Serve.
internal_kv                            The actor's name and what it stores outlive it. Remove: Ray
``policy_actor/``                      Serve has a store for applications.
Metric._record                         A counter that starts at 0. Remove: ``Counter.inc`` takes 0.
``observe/export.py``
ray.init(_metrics_export_port)         A port that Prometheus knows; another try where a start timed
``util/ray_instance.py``               out, which only the text of the error says. Remove: a public
                                       option, and an exception of its own.
map_batches(ray_remote_args_fn)        Restarts of a worker that died. Remove: it goes as announced;
``calibration/ray_job.py``             then another way to bound them is needed.
=====================================  ==========================================================
"""

from typing import TYPE_CHECKING

from sere_ray.util.late import late

if TYPE_CHECKING:
    from sere_ray.serve.app import build_app
    from sere_ray.serve.config import ServeConfig

__all__ = ["ServeConfig", "build_app"]
# Serve's controller, its proxies and its request routers import modules below this one only.
__getattr__ = late(
    __name__, {"ServeConfig": "sere_ray.serve.config", "build_app": "sere_ray.serve.app"}
)
