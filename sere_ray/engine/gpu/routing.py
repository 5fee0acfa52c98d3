"""What a layer's router answers on a GPU: ids that are re-routed, or will be.

Re-routing waits where vLLM's code that follows has a better place for it: where its experts sort
the ids, or where the ids of all ranks are gathered. The objects that do so are given the state
(``sere_state``), by which the patches find it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sere_ray.engine.back_end import Routing
from sere_ray.engine.gpu.state import CudaState
from sere_ray.engine.layer_checks import check_rows
from sere_ray.engine.placement import expert_owner
from sere_ray.kernel.across_ranks import Placement
from sere_ray.util.errors import UnsupportedError


def route(
    router: Any,
    original: Callable[..., Routing],
    hidden_states: Tensor,
    router_logits: Tensor,
    indices_type: torch.dtype | None,
    **kwargs: Any,
) -> Routing:
    """With one rank: the gate's choice, re-routed in place, now or when the experts sort it.

    Args:
        router: vLLM's.
        original: gives the gate's choice.
        hidden_states: ``[T, H]``.
        router_logits: ``[T, E]``.
        indices_type: of the ids that are asked for; None = any.
        kwargs: as vLLM passes them on.
    """
    state: CudaState = router.sere_state
    state.check_nothing_deferred()
    layer, runner = router.sere_layer, router.sere_runner()
    check_rows(layer, router_logits.shape[0], state.own.step_input.rows)
    sorts = router.capture_fn is None and _sorts_own_ids(runner)
    if sorts:
        runner.routed_experts.quant_method.moe_kernel.fused_experts.sere_state = state
    chooses = state.gates.is_plain(layer) and indices_type in (None, torch.int32)
    mask_logits = state.mask_logits_of(layer, router_logits)
    if sorts and chooses and state.own.can_route(router_logits):
        rows = router_logits, _padding_mask(router_logits.shape[0]), mask_logits
        held = state.own.defer_routing(layer, *rows, renormalize=router.renormalize)
        return state.hold(held)
    scores = state.scores_of(layer, router_logits)
    topk_weights, topk_ids = original(hidden_states, router_logits, indices_type, **kwargs)
    state.reroute(layer, topk_ids, topk_weights, scores, mask_logits, sorts=sorts)
    return topk_weights, topk_ids


def route_among_ranks(
    router: Any,
    original: Callable[..., Routing],
    hidden_states: Tensor,
    router_logits: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Routing:
    """With several ranks: the gate's choice, re-routed in place, now or when it is gathered.

    Args:
        router: vLLM's.
        original: gives the gate's choice.
        hidden_states: ``[T, H]``.
        router_logits: ``[T, E]``.
        args: as vLLM passes them on.
        kwargs: as vLLM passes them on.

    Raises:
        UnsupportedError: vLLM sends rows before they are routed.
    """
    state: CudaState = router.sere_state
    state.check_nothing_deferred()
    topk_weights, topk_ids = original(hidden_states, router_logits, *args, **kwargs)
    layer, runner = router.sere_layer, router.sere_runner()
    _note_owner(state, runner)
    gathers, sorts = _what_follows(runner)
    kernel, placement = runner.routed_experts.quant_method.moe_kernel, None
    if gathers:
        kernel.prepare_finalize.sere_state = state
        placement = _placement_of(state, runner)
    if sorts:
        kernel.fused_experts.sere_state = state
    scores = state.scores_of(layer, router_logits)
    state.route_layer(
        layer, topk_ids, topk_weights, placement=placement, sorts=sorts, logits=scores
    )
    return topk_weights, topk_ids


def _padding_mask(rows: int) -> Tensor | None:
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router

    mask: Tensor | None = fused_topk_router._get_padding_mask(rows)
    return mask


def _sorts_own_ids(runner: Any) -> bool:
    """Do the experts of this layer sort the very ids that its router returns?"""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
        MoEPrepareAndFinalizeNoDPEPModular,
    )

    experts, kernel = runner.routed_experts, runner.routed_experts.quant_method.moe_kernel
    return (
        kernel is not None
        and type(kernel.fused_experts) in (TritonExperts, MarlinExperts)
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


def _what_follows(runner: Any) -> tuple[bool, bool]:
    """Are the ids of all ranks gathered, and may the experts be given them sorted?

    Where a load balancer (EPLB) maps ids before they are gathered, the gathered ones are not those
    that the rule speaks of: then the union is exchanged before.
    """
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import (
        MoEPrepareAndFinalizeNaiveDPEPModular,
    )

    experts, kernel = runner.routed_experts, runner.routed_experts.quant_method.moe_kernel
    if kernel is None:
        raise UnsupportedError(
            f"sere: layer {runner.layer_name!r} sends its rows to all ranks before it routes them "
            f"({type(experts.quant_method).__name__}); use data_parallel_size = 1"
        )
    if runner.router.eplb_state is not None:
        return False, False
    gathers = type(kernel.prepare_finalize) is MoEPrepareAndFinalizeNaiveDPEPModular
    sorts = type(kernel.fused_experts) is TritonExperts and not experts.apply_router_weight_on_input
    return gathers, gathers and sorts


def _note_owner(state: CudaState, runner: Any) -> None:
    """Where experts are, for rules that look at ranks; in the first pass, which no graph captures.

    Where a load balancer keeps copies, an expert is on several ranks: nothing is noted.
    """
    assert state.union is not None
    owners, layer = state.union.owners, runner.layer_id
    if layer not in owners and runner.router.eplb_state is None:
        owners[layer] = expert_owner(runner).to(state.device, torch.uint8)


def _placement_of(state: CudaState, runner: Any) -> Placement:
    """On the device; made in the first pass, which no graph captures."""
    assert state.union is not None
    known = state.union.placements.get(runner.layer_id)
    if known is not None:
        return known
    owner, experts = expert_owner(runner), runner.routed_experts
    parallel = runner.moe_config.moe_parallel_config
    if not torch.equal(experts.expert_map.cpu() >= 0, owner == parallel.ep_rank):
        raise UnsupportedError(
            f"sere: layer {runner.layer_name!r} does not place its experts as vLLM's "
            f"{experts.expert_map_manager.placement_strategy!r} strategy does; start without a "
            "load balancer"
        )
    local_ids = experts.expert_map.to(state.device, torch.int32).contiguous()
    return Placement(local_ids, owner.to(state.device, torch.uint8), parallel.ep_size)
