"""What an engine on a GPU (V2 model runner) changes beside ``seam.py``, and the ledger of it.

=====================================  ==========================================================
GPUModelRunner.prepare_inputs          Row kinds of a step go to the device before it is launched.
                                       Why here: replay of a full graph passes through no forward
                                       context. Remove: as for _model_forward.
GPUModelRunner.add_requests            Remember which requests ask for exact routing. Why: the
                                       runner keeps no sampling parameters. Remove: it does.
GPUModelRunner.execute_model           A dummy pass (profiling, idle rank) has no row of anybody's.
                                       Remove: as for _model_forward.
triton_moe._prepare_expert_assignment  Re-route and sort by expert in one launch, where stock
                                       launches two to sort; in small batches the gate's top-k,
                                       too. Remove: a hook between routing and sorting.
TritonExperts.apply                    Gate-and-up GEMM with SiLU in its epilogue, where ``tiles/``
                                       has tiles for the model's shape and this GPU. Remove: vLLM
                                       has such a kernel.
=====================================  ==========================================================

With data parallelism also those of ``cuda_union_seam.py``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.engine.gpu.fused_experts import apply_experts
from sere_ray.engine.gpu.state import CudaState
from sere_ray.engine.row_kinds import row_kinds, scheduled_kinds
from sere_ray.engine.state import Routing, Wrap, all_states, find_state
from sere_ray.policy.tiers import asks_exact
from sere_ray.rules import EXACT


def install(wrap: Wrap) -> None:
    """Put the patches in place; calling it again does nothing."""
    from vllm.model_executor.layers.fused_moe.experts import triton_moe
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    wrap(GPUModelRunner, "prepare_inputs", _send_row_kinds)
    wrap(GPUModelRunner, "add_requests", _notice_exact_requests)
    wrap(GPUModelRunner, "execute_model", _notice_dummy_pass)
    wrap(triton_moe, "_prepare_expert_assignment", _reroute_and_align)
    wrap(triton_moe.TritonExperts, "apply", _compute_experts)


def route(
    router: Any,
    original: Callable[..., Routing],
    hidden_states: Tensor,
    router_logits: Tensor,
    indices_type: torch.dtype | None,
    **kwargs: Any,
) -> Routing:
    """The gate's choice, re-routed in place: now, or when the experts sort it.

    The layer is opaque to Dynamo here, so that this runs in every eager pass, and once for each
    captured graph.
    """
    state: CudaState = router.sere_state
    state.check_nothing_deferred()
    layer, is_softmax = router.sere_layer, is_plain_softmax(router)
    sorts = router.capture_fn is None and _sorts_as_expected(router.sere_runner())
    chooses = is_softmax and indices_type in (None, torch.int32)
    if sorts and chooses and state.can_route(router_logits):
        is_padding = _padding_mask(router_logits.shape[0])
        return state.defer_routing(layer, router_logits, is_padding, renormalize=router.renormalize)
    scores = state.scores_of(layer, router_logits, is_softmax=is_softmax)
    topk_weights, topk_ids = original(hidden_states, router_logits, indices_type, **kwargs)
    reroute = state.defer if sorts else state.reroute_inplace
    reroute(layer, topk_ids, topk_weights, scores)
    return topk_weights, topk_ids


def is_plain_softmax(router: Any) -> bool:
    """Is the gate a softmax and a top-k, without groups and bias? The kernels know that one."""
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

    return type(router).__bases__ == (FusedTopKRouter,) and router.scoring_func == "softmax"


def _padding_mask(rows: int) -> Tensor | None:
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router

    mask: Tensor | None = fused_topk_router._get_padding_mask(rows)
    return mask


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
        and not _scales_over_all_rows(kernel.fused_experts)
    )


def _scales_over_all_rows(experts: Any) -> bool:
    """Is the second GEMM's scale a maximum over the whole workspace, in which the rows of slots
    that our sorting leaves out hold anything? vLLM writes them: see ``TritonExperts.apply``."""
    is_dynamic = experts.quant_dtype is not None and experts.a2_scale is None
    return is_dynamic and experts.block_shape is None and not experts.per_act_token_quant


def _send_row_kinds(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    batch = original(runner, *args, **kwargs)
    state = find_state(runner.vllm_config)
    if isinstance(state, CudaState):
        state.check_nothing_deferred()
        if all("_warmup_" in name for name in batch.req_ids):  # vLLM's own requests at start
            state.begin_dummy_step()
            return batch
        starts = batch.query_start_loc_np[: batch.num_reqs + 1]
        state.begin_step(row_kinds(request_kinds(state, batch), starts))
    return batch


def request_kinds(state: CudaState, batch: Any) -> NDArray[np.int8]:
    """Kind of each scheduled request's rows, from what the runner knows of the batch."""
    kinds = scheduled_kinds(batch.is_prefilling_np)
    for i, request in enumerate(batch.req_ids if state.exact_requests else ()):
        if request in state.exact_requests:
            kinds[i] = EXACT
    return kinds


def _notice_exact_requests(
    original: Callable[..., Any], runner: Any, scheduler_output: Any
) -> None:
    original(runner, scheduler_output)
    state = find_state(runner.vllm_config)
    if isinstance(state, CudaState):
        for new in scheduler_output.scheduled_new_reqs:
            if asks_exact(new.sampling_params):
                state.exact_requests.add(new.req_id)
        if state.exact_requests:
            state.exact_requests &= runner.req_states.req_id_to_index.keys()


def _notice_dummy_pass(
    original: Callable[..., Any],
    runner: Any,
    scheduler_output: Any,
    intermediate_tensors: Any = None,
    dummy_run: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    state = find_state(runner.vllm_config)
    if dummy_run and isinstance(state, CudaState):
        state.begin_dummy_step()
    return original(runner, scheduler_output, intermediate_tensors, dummy_run, *args, **kwargs)


def _deferring() -> CudaState | None:
    """The engine whose layer is being computed, if that layer is re-routed when it is sorted."""
    states = (s for s in all_states() if isinstance(s, CudaState) and s.deferred)
    return next(states, None)


def _reroute_and_align(
    original: Callable[..., Any],
    topk_ids: Tensor,
    config: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    state = _deferring()
    skips_foreign = bool(kwargs.get("ignore_invalid_experts"))
    aligned = state.align(topk_ids, config["BLOCK_SIZE_M"], skips_foreign) if state else None
    return aligned or original(topk_ids, config, *args, **kwargs)


def _compute_experts(original: Callable[..., Any], experts: Any, *args: Any, **kwargs: Any) -> Any:
    if args or not _deferring():
        return original(experts, *args, **kwargs)
    return apply_experts(original, experts, **kwargs)
