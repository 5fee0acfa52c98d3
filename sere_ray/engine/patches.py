"""Where vLLM is changed, and the ledger of what every engine with the ``sere`` key changes.

Platforms add to it: ``cpu_seam.py`` and ``cuda_seam.py`` hold theirs, each with its ledger.

Observers, in place wherever the plugin is loaded; without the ``sere`` key they call straight
through and change nothing:

=====================================  ==========================================================
target                                 what, why, remove when
=====================================  ==========================================================
VllmConfig.__post_init__               Validate the key before the model loads. Why: a plugin gets
                                       no configuration. Remove: vLLM hands plugins the config.
MoERunner.__init__                     Attach the rule to each layer's router, and put the patches
                                       below in place. Why: the runner holds its router by
                                       reference, so it must be changed as it is built. Remove:
                                       vLLM offers a hook after ``_compute_routing``.
EngineCore.preprocess_add_request      Add the policy, or the exact tier, to ``cache_salt``, so
                                       that blocks computed under one policy are never found under
                                       another, nor by exact requests: see ``kv_salt.py``. Remove:
                                       prefix caching takes an engine-wide salt.
EngineCore.add_request, collective_rpc Notice a policy change; requests that still wait get the
                                       salt of the new one. Remove: as above.
=====================================  ==========================================================

Patches, put in place by the first layer that is built under a ``sere`` key:

=====================================  ==========================================================
BaseRouter subclass of each instance   ``_compute_routing`` ends in re-routing, on logical ids,
                                       before the load balancer's map: on a CPU through the op
                                       ``sere_ray::choose``, on a GPU by a launch in place.
                                       Remove: as for MoERunner.
base_loader.process_weights_after_     Check the router fingerprint while gates still hold the
loading                                checkpoint's values; then, with ``dispatch: all_to_all``,
                                       take vLLM's all-gather out of each layer's kernel, see
                                       ``dispatch.py``. Remove: a hook after weight loading.
WorkerBase.sere_*                      Methods that ``collective_rpc`` reaches by name. Remove:
                                       ``worker_extension_cls`` takes several classes.
=====================================  ==========================================================

"""

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch

from sere_ray.engine import kv_salt
from sere_ray.engine.checks import (
    check_config,
    check_routes_outside_kernel,
    sere_config,
)
from sere_ray.engine.cpu import expert_parallel as cpu_expert_parallel
from sere_ray.engine.cpu import patches as cpu_seam
from sere_ray.engine.cpu import union_patches as cpu_union_seam
from sere_ray.engine.cpu.rules import check_gate
from sere_ray.engine.cpu.state import CpuState
from sere_ray.engine.gpu import patches as cuda_seam
from sere_ray.engine.gpu import union_patches as cuda_union_seam
from sere_ray.engine.gpu.state import CudaState
from sere_ray.engine.gpu.union import UnionCudaState
from sere_ray.engine.state import EngineState, Routing, add_state, all_states, find_state
from sere_ray.util.errors import UnsupportedError

logger = logging.getLogger("vllm.sere_ray")
_MARK = "_sere_ray_original"


def install_observers() -> None:
    """Put the observers in place; calling it again does nothing."""
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.v1.engine.core import EngineCore

    cpu_seam.define_op()
    _wrap(VllmConfig, "__post_init__", _validate_config)
    _wrap(MoERunner, "__init__", _attach_runner)
    _wrap(EngineCore, "preprocess_add_request", kv_salt.salt_request)
    _wrap(EngineCore, "add_request", kv_salt.salt_again)
    _wrap(EngineCore, "collective_rpc", kv_salt.notice_policy_change)


def _install_patches(state: EngineState, vllm_config: Any) -> None:
    from vllm.model_executor.model_loader import base_loader
    from vllm.v1.worker.worker_base import WorkerBase

    _wrap(base_loader, "process_weights_after_loading", _check_loaded)
    for method in (sere_counters, sere_set_policy, sere_settle):
        setattr(WorkerBase, method.__name__, method)
    if isinstance(state, CudaState):
        cuda_seam.install(_wrap)
        if isinstance(state, UnionCudaState):
            cuda_union_seam.install(_wrap)
    else:
        cpu_seam.install(_wrap, vllm_config)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by ``wrapper(original, *args, **kwargs)``, once."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, original)
    setattr(owner, name, wrapped)


# --- front end: validate before anything loads -------------------------------------------------


def _validate_config(original: Callable[..., Any], config: Any) -> None:
    original(config)
    model = config.model_config
    if model is None or model.is_submodel_config or sere_config(config) is None:
        return
    check_config(config)


# --- worker: attach the rule to every layer ----------------------------------------------------


def _get_state(vllm_config: Any) -> EngineState:
    """The state of the engine with this configuration, made when its first layer is built."""
    state = find_state(vllm_config)
    if state is None:
        state = _make_state(vllm_config)
        add_state(vllm_config, state)
    return state


def _make_state(vllm_config: Any) -> EngineState:
    policy, startup, artifact = check_config(vllm_config)
    top_k = vllm_config.model_config.get_num_experts_per_tok()
    max_rows = vllm_config.scheduler_config.max_num_batched_tokens
    if vllm_config.device_config.device_type == "cpu":
        logger.info("sere-ray: %s; CPU path", policy.model_dump_json())
        return cpu_union_seam.make_state(vllm_config, policy, startup, artifact, top_k, max_rows)
    device = torch.device("cuda", torch.cuda.current_device())
    logger.info("sere-ray: %s; CUDA kernel on %s", policy.model_dump_json(), device)
    num_experts = vllm_config.model_config.get_num_experts()
    single = (policy, artifact, top_k, num_experts, max_rows, device)
    if vllm_config.parallel_config.data_parallel_size == 1:
        return CudaState(*single)
    return UnionCudaState(
        *single, **cuda_union_seam.ranks_of_engine(vllm_config, num_experts, device)
    )


def _attach_runner(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> None:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    original(runner, *args, **kwargs)
    vllm_config = get_current_vllm_config()
    if sere_config(vllm_config) is None:
        return
    state, layer = _get_state(vllm_config), runner.layer_id
    _install_patches(state, vllm_config)
    state.artifact.matrix(layer, path=state.policy.similarity)
    method = runner.routed_experts.quant_method
    kernel = getattr(method, "experts_cls", method)
    backend = getattr(kernel, "__name__", type(method).__name__)
    check_routes_outside_kernel(runner.layer_name, runner.is_monolithic, backend)
    if isinstance(state, CpuState) and vllm_config.parallel_config.enable_expert_parallel:
        cpu_expert_parallel.prepare_layer(runner, kernel)
        state.owner[layer] = cpu_expert_parallel.expert_owner(runner)
    if not isinstance(runner.router, BaseRouter):
        raise UnsupportedError(
            f"sere: layer {runner.layer_name!r} has its own router "
            f"{type(runner.router).__name__}; this model cannot be re-routed: remove the 'sere' key"
        )
    router = runner.router
    router.sere_layer = layer
    if isinstance(state, CudaState):
        router.sere_state, router.sere_runner = state, weakref.ref(runner)
        route = cuda_union_seam.route if isinstance(state, UnionCudaState) else cuda_seam.route
        router.__class__ = _rerouting_class(router.__class__, route)
        if not cuda_seam.is_plain_softmax(router):
            state.without_scores.add(layer)
        state.check_scores(state.policy)
    else:
        check_gate(state.policy, router)
        router.__class__ = _rerouting_class(router.__class__, cpu_seam.route)
    state.attached[layer] = runner


@functools.cache
def _rerouting_class(router_class: type[Any], compute: Callable[..., Routing]) -> type:
    # A subclass with one base keeps the object layout, so an instance's __class__ may be set.
    def _compute_routing(self: Any, *args: Any, **kwargs: Any) -> Routing:
        return compute(
            self, functools.partial(router_class._compute_routing, self), *args, **kwargs
        )

    return type(
        f"Rerouting{router_class.__name__}", (router_class,), {"_compute_routing": _compute_routing}
    )


# --- worker: after loading ----------------------------------------------------------------------


def _check_loaded(
    original: Callable[..., Any], model: Any, model_config: Any, *args: Any, **kwargs: Any
) -> None:
    modules = set(model.modules())
    states = [s for s in all_states() if modules.intersection(s.attached.values())]
    for state in states:
        # That every layer has its matrix is checked as it is built.
        state.artifact.check_layers(
            state.attached, path=state.policy.similarity, but="those of the model have no experts"
        )
        _check_router_weights(state, model)
    original(model, model_config, *args, **kwargs)
    for state in states:
        state.loaded()


def _check_router_weights(state: EngineState, model: Any) -> None:
    """Compare each gate with the one that was calibrated. Its name ends where experts' begins."""
    if state.artifact.metadata.synthetic:
        return
    modules = dict(model.named_modules())
    for layer, runner in state.attached.items():
        gate = modules.get(runner.layer_name.rpartition(".")[0] + ".gate")
        if gate is None:
            raise UnsupportedError(
                f"sere: layer {runner.layer_name!r} has no module 'gate' beside its experts, so "
                "the artifact cannot be checked; this model is not supported: remove the 'sere' key"
            )
        if gate.weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise UnsupportedError(
                f"sere: the gate of layer {runner.layer_name!r} is quantised to "
                f"{gate.weight.dtype}, so the artifact cannot be checked; leave gates out of the "
                "quantisation, as published quantised checkpoints do"
            )
        state.artifact.check_router(layer, gate.weight, path=state.policy.similarity)


# --- worker: control by name through collective_rpc --------------------------------------------


def sere_counters(worker: Any, reset: bool = True) -> dict[str, Any]:
    """Counters of this worker; see :meth:`EngineState.read_counters`."""
    return _get_state(worker.vllm_config).read_counters(reset=reset)


def sere_set_policy(
    worker: Any, policy: dict[str, Any], artifact: bytes | None = None
) -> dict[str, Any]:
    """Set the policy of this worker from the next step on; see :meth:`EngineState.set_policy`."""
    return _get_state(worker.vllm_config).set_policy(policy, artifact).model_dump()


def sere_settle(worker: Any) -> None:
    """Nothing here: the engine core notices that all ranks were told the last policy."""
