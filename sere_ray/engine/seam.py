"""The only code that changes vLLM, and the ledger of every change.

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
EngineCore.preprocess_add_request      Add the policy version to ``cache_salt``, so that blocks
                                       computed under one policy are never found under another.
                                       Remove: prefix caching takes an engine-wide salt.
EngineCore.collective_rpc              Notice a policy change and raise that version. Remove: as
                                       above.
=====================================  ==========================================================

Patches, put in place by the first layer that is built under a ``sere`` key:

=====================================  ==========================================================
BaseRouter subclass of each instance   ``_compute_routing`` ends in re-routing, on logical ids,
                                       before the load balancer's map: on a CPU through the op
                                       ``sere_ray::reroute``, on a GPU by a launch in place.
                                       Remove: as for MoERunner.
base_loader.process_weights_after_     Check the router fingerprint while gates still hold the
loading                                checkpoint's values. Remove: a hook after weight loading.
WorkerBase.sere_*                      Methods that ``collective_rpc`` reaches by name. Remove:
                                       ``worker_extension_cls`` takes several classes.
=====================================  ==========================================================

On a CPU (V1 model runner) also:

=====================================  ==========================================================
GPUModelRunner._model_forward          Row kinds and step totals around the forward pass (warm-up
                                       calls the model directly and so stays exact). Remove: vLLM
                                       exposes row kinds in the forward context.
dispatcher._rebind_kernels             A second engine in one process: vLLM looks through every
                                       loaded module for kernels and stumbles over llvmlite's
                                       library object, which the compiled rule brings in (numba).
                                       Remove: vLLM reads ``__dict__`` with a type check.
=====================================  ==========================================================

With ``enable_expert_parallel`` on a CPU also those of ``cpu_expert_parallel.py``, ``cpu_union.py``.

On a GPU (V2 model runner) also:

=====================================  ==========================================================
GPUModelRunner.prepare_inputs          Row kinds of a step go to the device before it is launched.
                                       Why here: replay of a full graph passes through no forward
                                       context. Remove: as for _model_forward.
GPUModelRunner.execute_model           A dummy pass (profiling, idle rank) has no row of anybody's.
                                       Remove: as for _model_forward.
triton_moe.try_get_optimal_moe_config  Tiles that are measured to be better for re-routed batches
                                       and not worse for others, where ``tiles/`` has some for the
                                       model's shape and this GPU. Remove: vLLM ships such tiles.
triton_moe._prepare_expert_assignment  Re-route and sort by expert in one launch, where stock
                                       launches two to sort; in small batches the gate's top-k,
                                       too. Remove: a hook between routing and sorting.
=====================================  ==========================================================
"""

import functools
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sere_ray.engine import cpu_expert_parallel, cpu_union
from sere_ray.engine.checks import (
    check_config,
    check_routes_outside_kernel,
    sere_config,
)
from sere_ray.engine.cpu_state import CpuState, active_state
from sere_ray.engine.cuda_state import CudaState
from sere_ray.engine.row_kinds import request_kinds, row_kinds, scheduled_kinds
from sere_ray.engine.state import EngineState
from sere_ray.engine.tiles import tile_for
from sere_ray.errors import UnsupportedError

logger = logging.getLogger("vllm.sere_ray")
_MARK = "_sere_ray_original"


def install_observers() -> None:
    """Put the observers in place; calling it again does nothing."""
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.v1.engine.core import EngineCore

    _define_op()
    _wrap(VllmConfig, "__post_init__", _validate_config)
    _wrap(MoERunner, "__init__", _attach_runner)
    _wrap(EngineCore, "preprocess_add_request", _salt_request)
    _wrap(EngineCore, "collective_rpc", _notice_policy_change)


def _install_patches(state: EngineState, vllm_config: Any) -> None:
    from vllm.model_executor.model_loader import base_loader
    from vllm.v1.worker.worker_base import WorkerBase

    _wrap(base_loader, "process_weights_after_loading", _check_loaded)
    for method in (sere_counters, sere_set_policy):
        setattr(WorkerBase, method.__name__, method)
    if isinstance(state, CudaState):
        _install_cuda_patches()
    else:
        _install_cpu_patches(vllm_config)


def _install_cpu_patches(vllm_config: Any) -> None:
    from vllm.triton_utils import dispatcher
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _wrap(GPUModelRunner, "_model_forward", _run_step)
    _wrap(dispatcher, "_rebind_kernels", _hide_llvmlite)
    if vllm_config.parallel_config.enable_expert_parallel:
        cpu_expert_parallel.install(_wrap)
        cpu_union.install(_wrap, _find_state)


def _install_cuda_patches() -> None:
    from vllm.model_executor.layers.fused_moe.experts import triton_moe
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    _wrap(GPUModelRunner, "prepare_inputs", _send_row_kinds)
    _wrap(GPUModelRunner, "execute_model", _notice_dummy_pass)
    _wrap(triton_moe, "try_get_optimal_moe_config", _choose_tile)
    _wrap(triton_moe, "_prepare_expert_assignment", _reroute_and_align)


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

_states: dict[int, tuple[Any, EngineState]] = {}
"""By id() of an engine's VllmConfig, which is kept too: an id is free again once its object is."""


def _find_state(vllm_config: Any) -> EngineState | None:
    return _states.get(id(vllm_config), (None, None))[1]


def _get_state(vllm_config: Any) -> EngineState:
    """The state of the engine with this configuration, made when its first layer is built."""
    state = _find_state(vllm_config)
    if state is None:
        state = _make_state(vllm_config)
        _states[id(vllm_config)] = vllm_config, state
    return state


def _make_state(vllm_config: Any) -> EngineState:
    policy, artifact = check_config(vllm_config)
    top_k = vllm_config.model_config.get_num_experts_per_tok()
    max_rows = vllm_config.scheduler_config.max_num_batched_tokens
    if vllm_config.device_config.device_type == "cpu":
        logger.info("sere-ray: %s; CPU path", policy.model_dump_json())
        return cpu_union.make_state(vllm_config, policy, artifact, top_k, max_rows)
    device = torch.device("cuda", torch.cuda.current_device())
    logger.info("sere-ray: %s; CUDA kernel on %s", policy.model_dump_json(), device)
    num_experts = vllm_config.model_config.get_num_experts()
    return CudaState(policy, artifact, top_k, num_experts, max_rows, device)


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
    if not isinstance(runner.router, BaseRouter):
        raise UnsupportedError(
            f"sere: layer {runner.layer_name!r} has its own router "
            f"{type(runner.router).__name__}; this model cannot be re-routed: remove the 'sere' key"
        )
    router = runner.router
    router.sere_layer = layer
    if isinstance(state, CudaState):
        router.sere_state, router.sere_runner = state, weakref.ref(runner)
        router.sere_is_plain_softmax = _is_plain_softmax(router)
        router.__class__ = _rerouting_class(router.__class__, _route_on_cuda)
    else:
        router.__class__ = _rerouting_class(router.__class__, _route_on_cpu)
    state.attached[layer] = runner


Routing = tuple[Tensor, Tensor]
"""``topk_weights`` and ``topk_ids``, ``[T, K]`` each, as vLLM orders them."""


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


def _route_on_cpu(
    router: Any, original: Callable[..., Routing], *args: Any, **kwargs: Any
) -> Routing:
    topk_weights, topk_ids = original(*args, **kwargs)
    return topk_weights, torch.ops.sere_ray.reroute(topk_ids, topk_weights, router.sere_layer)


def _route_on_cuda(
    router: Any,
    original: Callable[..., Routing],
    hidden_states: Tensor,
    router_logits: Tensor,
    indices_type: torch.dtype | None,
    **kwargs: Any,
) -> Routing:
    """Defer what the experts' sorting can share a launch with; else re-route in place.

    The layer is opaque to Dynamo here, so that this runs in every eager pass, and once for each
    captured graph.
    """
    state: CudaState = router.sere_state
    state.check_nothing_deferred()
    sorts = router.capture_fn is None and _sorts_as_expected(router.sere_runner())
    plain = router.sere_is_plain_softmax and indices_type in (None, torch.int32)
    if sorts and plain and state.can_route(router_logits):
        is_padding = _padding_mask(router_logits.shape[0])
        return state.defer_routing(
            router.sere_layer, router_logits, is_padding, renormalize=router.renormalize
        )
    topk_weights, topk_ids = original(hidden_states, router_logits, indices_type, **kwargs)
    if sorts:
        state.defer(router.sere_layer, topk_ids, topk_weights)
    else:
        state.reroute_inplace(router.sere_layer, topk_ids, topk_weights)
    return topk_weights, topk_ids


def _padding_mask(rows: int) -> Tensor | None:
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router

    mask: Tensor | None = fused_topk_router._get_padding_mask(rows)
    return mask


def _is_plain_softmax(router: Any) -> bool:
    """Is the gate a softmax and a top-k, without groups and bias? `route.cu` knows that one."""
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

    return type(router) is FusedTopKRouter and router.scoring_func == "softmax"


def _sorts_as_expected(runner: Any) -> bool:
    """Do the experts of this layer sort the very ids that its router returns?"""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
        MoEPrepareAndFinalizeNoDPEPModular,
    )

    experts, kernel = runner.routed_experts, runner.routed_experts.quant_method.moe_kernel
    return (
        type(kernel.fused_experts) is TritonExperts
        and type(kernel.prepare_finalize) is MoEPrepareAndFinalizeNoDPEPModular
        and experts.expert_map is None
        and not experts.apply_router_weight_on_input
        and runner.router.eplb_state is None
    )


@functools.cache
def _define_op() -> None:
    """One opaque op, so that Dynamo does not trace the rule; the state is looked up at run time."""

    def reroute(topk_ids: Tensor, topk_weights: Tensor, layer: int) -> Tensor:
        state = active_state()
        return topk_ids.clone() if state is None else state.reroute(layer, topk_ids, topk_weights)

    op = torch.library.custom_op(
        "sere_ray::reroute",
        reroute,
        mutates_args=(),
        schema="(Tensor topk_ids, Tensor topk_weights, int layer) -> Tensor",
    )
    op.register_fake(lambda topk_ids, topk_weights, layer: torch.empty_like(topk_ids))


def _hide_llvmlite(original: Callable[..., Any], *args: Any) -> Any:
    hidden = {name: module for name, module in sys.modules.items() if name.startswith("llvmlite")}
    for name in hidden:
        del sys.modules[name]
    try:
        return original(*args)
    finally:
        sys.modules.update(hidden)


# --- worker: after loading, and around each step -----------------------------------------------


def _check_loaded(
    original: Callable[..., Any], model: Any, model_config: Any, *args: Any, **kwargs: Any
) -> None:
    modules = set(model.modules())
    for _, state in _states.values():
        if modules.intersection(state.attached.values()):
            _check_router_weights(state, model)
    original(model, model_config, *args, **kwargs)


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


def _run_step(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    state = _find_state(runner.vllm_config)
    if not isinstance(state, CpuState):
        return original(runner, *args, **kwargs)
    batch, count = runner.input_batch, runner.input_batch.num_reqs
    kinds = request_kinds(
        batch.num_computed_tokens_cpu[:count],
        batch.num_prompt_tokens[:count],
        batch.num_tokens_no_spec[:count],
    )
    with state.step(row_kinds(kinds, runner.query_start_loc.np[: count + 1])):
        return original(runner, *args, **kwargs)


def _send_row_kinds(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    batch = original(runner, *args, **kwargs)
    state = _find_state(runner.vllm_config)
    if isinstance(state, CudaState):
        state.check_nothing_deferred()
        if all("_warmup_" in name for name in batch.req_ids):  # vLLM's own requests at start
            state.begin_dummy_step()
            return batch
        starts = batch.query_start_loc_np[: batch.num_reqs + 1]
        state.begin_step(row_kinds(scheduled_kinds(batch.is_prefilling_np), starts))
    return batch


def _notice_dummy_pass(
    original: Callable[..., Any],
    runner: Any,
    scheduler_output: Any,
    intermediate_tensors: Any = None,
    dummy_run: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    state = _find_state(runner.vllm_config)
    if dummy_run and isinstance(state, CudaState):
        state.begin_dummy_step()
    return original(runner, scheduler_output, intermediate_tensors, dummy_run, *args, **kwargs)


def _choose_tile(
    original: Callable[..., Any],
    w1_shape: tuple[int, ...],
    w2_shape: tuple[int, ...],
    top_k: int,
    dtype: str | None,
    rows: int,
    *args: Any,
    **kwargs: Any,
) -> dict[str, int]:
    if any(isinstance(s, CudaState) and s.deferred for _, s in _states.values()):
        tile = tile_for(w2_shape[0], w2_shape[2], dtype, rows)
        if tile is not None:
            return tile
    config: dict[str, int] = original(w1_shape, w2_shape, top_k, dtype, rows, *args, **kwargs)
    return config


def _reroute_and_align(
    original: Callable[..., Any],
    topk_ids: Tensor,
    config: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    for _, state in _states.values():
        if isinstance(state, CudaState):
            aligned = state.align(topk_ids, config["BLOCK_SIZE_M"])
            if aligned is not None:
                return tuple(aligned)
    return original(topk_ids, config, *args, **kwargs)


# --- worker: control by name through collective_rpc --------------------------------------------


def sere_counters(worker: Any, reset: bool = True) -> dict[str, Any]:
    """Counters of this worker; see :meth:`EngineState.read_counters`."""
    return _get_state(worker.vllm_config).read_counters(reset=reset)


def sere_set_policy(worker: Any, policy: dict[str, Any]) -> dict[str, Any]:
    """Set the policy of this worker from the next step on."""
    return _get_state(worker.vllm_config).set_policy(policy).model_dump()


# --- engine core: KV blocks of one policy are never found under another -------------------------


def _notice_policy_change(
    original: Callable[..., Any], core: Any, method: Any, *args: Any, **kwargs: Any
) -> Any:
    result = original(core, method, *args, **kwargs)
    if method == sere_set_policy.__name__:
        core.sere_policy_version = getattr(core, "sere_policy_version", 0) + 1
    return result


def _salt_request(original: Callable[..., Any], core: Any, request: Any) -> Any:
    version = getattr(core, "sere_policy_version", 0)
    if version:
        request.cache_salt = f"{request.cache_salt or ''}|sere-policy-{version}"
    return original(core, request)
