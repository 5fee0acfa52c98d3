"""The SERE rule (arXiv 2602.07616) for a continuous-batching server: the reference.

This file is the specification in torch. Every other implementation must give the same
integers. T rows (tokens), K slots of a row, E logical experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PADDING = 0
"""Row kind of a row that no request owns (CUDA-graph or data-parallel padding)."""
REROUTABLE = 1
"""Row kind of a decode row: its secondary slots may be re-routed."""
EXACT = 2
"""Row kind of a prefill row, or of a row whose request asked for exact routing."""


def reroute(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    *,
    row_kind: Tensor | None = None,
    select_top_k: int,
    threshold: float | None = None,
    min_primary_experts: int = 0,
    unavailable: Tensor | None = None,
) -> Tensor:
    """Re-route secondary expert choices to the most similar expert the batch reads anyway.

    Args:
        topk_ids: ``[T, K]`` int32 or int64, the gate's choices. An id outside ``0 <= id < E``
            is a sentinel (for instance -1) and stays as it is.
        topk_weights: ``[T, K]`` float, finite; ranks the slots of a row, is never changed.
        similarity: ``[E, E]`` float32, finite; row u says how well each v stands in for u.
        row_kind: ``[T]`` int8 of ``PADDING``, ``REROUTABLE``, ``EXACT``; None = all re-routable.
        select_top_k: S, how many of a row's best slots are primary. ``S <= 0`` and ``S >= K``
            change nothing (but for ``unavailable``).
        threshold: rho; a stand-in less similar than this is refused and the expert is kept as a
            critical one. Rounded to float32 once. None = every stand-in is accepted.
        min_primary_experts: m; raises S until the primary set holds min(m, |P_K|) experts.
        unavailable: ``[E]`` bool; experts whose rank is gone. Every slot that names one goes to
            the most similar available expert, in the primary set if that is not empty, whatever
            the row kind, S and threshold.

    Returns:
        ``[T, K]`` new tensor of the dtype of ``topk_ids``.

    Raises:
        ValueError: a shape or dtype is wrong.

    Example:
        >>> ids = torch.tensor([[0, 1], [2, 3]])
        >>> weights = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
        >>> similarity = torch.eye(4) + torch.tensor([0.0, 0.0, 0.5, 0.0])
        >>> reroute(ids, weights, similarity, select_top_k=1)
        tensor([[0, 2],
                [2, 2]])
    """
    if not 0 < select_top_k < topk_ids.shape[-1] and unavailable is None:
        _check(topk_ids, topk_weights, similarity, row_kind, unavailable)
        return topk_ids.clone()
    plan = make_plan(
        topk_ids,
        topk_weights,
        similarity,
        row_kind=row_kind,
        select_top_k=select_top_k,
        threshold=threshold,
        min_primary_experts=min_primary_experts,
        unavailable=unavailable,
    )
    return apply_plan(plan, topk_ids, row_kind)


class Plan(NamedTuple):
    """What one layer does in one step: everything the rule derives before it touches a slot."""

    named: Tensor
    """``[E]`` bool: experts that a re-routable or exact row names."""
    primary: Tensor
    """``[E]`` bool: P, the experts every other choice is re-routed to."""
    target: Tensor
    """``[E]`` int64: where a re-routable row's slot goes, itself if it stays."""
    fallback: Tensor | None
    """``[E]`` int64: the same for every other row; None = they stay."""


def make_plan(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    *,
    row_kind: Tensor | None,
    select_top_k: int,
    threshold: float | None = None,
    min_primary_experts: int = 0,
    unavailable: Tensor | None = None,
) -> Plan:
    """Steps 1 to 4 and 7 of the specification; arguments as for :func:`reroute`."""
    _check(topk_ids, topk_weights, similarity, row_kind, unavailable)
    num_slots, num_experts = topk_ids.shape[1], similarity.shape[0]
    active = 0 < select_top_k < num_slots
    itself = torch.arange(num_experts, device=topk_ids.device)

    lowest_rank = lowest_slot_rank(topk_ids, topk_weights, num_experts, row_kind)
    named = lowest_rank < num_slots
    if unavailable is not None:
        lowest_rank = lowest_rank.masked_fill(unavailable, num_slots)
    size = select_top_k if active else num_slots
    primary = primary_set(lowest_rank, size, min_primary_experts, num_slots)

    target, fallback = itself, None
    if active:
        best, stand_in = similarity.masked_fill(~primary, -torch.inf).max(dim=1)  # lowest index
        stays = primary | torch.isneginf(best)  # -inf: P is empty
        if threshold is not None:
            rho = torch.tensor(threshold, dtype=torch.float32, device=best.device)
            stays = stays | (best < rho)
        target = torch.where(stays, itself, stand_in)
    if unavailable is not None:
        candidates = torch.where(primary.any(), primary, ~unavailable)
        nearest = similarity.masked_fill(~candidates, -torch.inf).argmax(dim=1)
        gone = unavailable & candidates.any()
        fallback = torch.where(gone, nearest, itself)
        target = torch.where(gone, nearest, target)
    return Plan(named, primary, target, fallback)


def apply_plan(plan: Plan, topk_ids: Tensor, row_kind: Tensor | None) -> Tensor:
    """Step 4 and 5 on every slot. Returns a new ``[T, K]`` tensor."""
    valid = _is_valid(topk_ids, plan.named.shape[0])
    ids = torch.where(valid, topk_ids, 0).long()
    new_ids = plan.target[ids]
    if row_kind is not None:
        others = ids if plan.fallback is None else plan.fallback[ids]
        new_ids = torch.where((row_kind == REROUTABLE)[:, None], new_ids, others)
    return torch.where(valid, new_ids.to(topk_ids.dtype), topk_ids)


def lowest_slot_rank(
    topk_ids: Tensor, topk_weights: Tensor, num_experts: int, row_kind: Tensor | None
) -> Tensor:
    """Steps 1 and 2: per expert, the best rank any row gives it; P_s = the entries below s.

    An exact row counts as rank 0 for each of its experts, since they are read anyway. This is
    the vector that expert-parallel ranks reduce with MIN.

    Returns:
        ``[E]`` int64: 0..K-1, or K where no re-routable or exact row names the expert.
    """
    num_slots = topk_ids.shape[1]
    valid = _is_valid(topk_ids, num_experts)
    by_weight = torch.where(valid, topk_weights, -torch.inf)
    order = by_weight.argsort(dim=1, descending=True, stable=True)
    slots = torch.arange(num_slots, device=topk_ids.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, slots)
    if row_kind is not None:
        rank = rank.masked_fill((row_kind == EXACT)[:, None], 0)
        valid = valid & (row_kind != PADDING)[:, None]
    rank = rank.masked_fill(~valid, num_slots)
    ids = torch.where(valid, topk_ids, 0).long()
    lowest = torch.full((num_experts,), num_slots, device=topk_ids.device)
    return lowest.scatter_reduce_(0, ids.flatten(), rank.flatten(), "amin")


def primary_set(lowest_rank: Tensor, select_top_k: int, floor: int, num_slots: int) -> Tensor:
    """Step 3: P = P_S_eff, S_eff the smallest s >= S with ``|P_s| >= min(floor, |P_K|)``.

    Returns:
        ``[E]`` bool.
    """
    if floor <= 0:
        return lowest_rank < select_top_k
    zeros = torch.zeros(num_slots + 1, dtype=torch.long, device=lowest_rank.device)
    new_at_rank = zeros.scatter_add_(0, lowest_rank, torch.ones_like(lowest_rank))
    size = new_at_rank[:num_slots].cumsum(0)  # size[s - 1] = |P_s|, rising with s
    too_small = (size < size[-1].clamp(max=floor)).sum()
    return lowest_rank < (too_small + 1).clamp(min=select_top_k)


class RuleCounts(NamedTuple):
    """What the rule did in one layer of one step; 0-d int64 tensors, no host synchronisation."""

    experts_before: Tensor
    """Distinct experts that non-padding rows name before the rule."""
    experts_after: Tensor
    """The same after the rule: what the layer reads from memory."""
    slots_rerouted: Tensor
    """Slots whose expert changed."""
    critical_kept: Tensor
    """Experts read outside P: no stand-in was similar enough."""


def count(plan: Plan, topk_ids: Tensor, new_ids: Tensor, row_kind: Tensor | None) -> RuleCounts:
    """Counters of the specification.

    Args:
        plan: the plan that turned ``topk_ids`` into ``new_ids``.
        topk_ids: ``[T, K]`` before the rule.
        new_ids: ``[T, K]`` after it.
        row_kind: ``[T]`` int8 or None.
    """
    num_experts = plan.named.shape[0]
    read = _is_valid(new_ids, num_experts)
    if row_kind is not None:
        read = read & (row_kind != PADDING)[:, None]
    after = torch.zeros(num_experts, dtype=torch.bool, device=new_ids.device)
    after = after.index_put((torch.where(read, new_ids, 0).long(),), read, accumulate=True)
    experts_after = after.sum()
    return RuleCounts(
        experts_before=plan.named.sum(),
        experts_after=experts_after,
        slots_rerouted=(new_ids != topk_ids).sum(),
        critical_kept=experts_after - plan.primary.sum(),
    )


def _is_valid(ids: Tensor, num_experts: int) -> Tensor:
    return (ids >= 0) & (ids < num_experts)


def _check(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    row_kind: Tensor | None,
    unavailable: Tensor | None,
) -> None:
    def require(ok: bool, message: str) -> None:
        if not ok:
            raise ValueError(message)

    require(topk_ids.dim() == 2, f"topk_ids must be [T, K], got shape {tuple(topk_ids.shape)}")
    require(
        topk_ids.dtype in (torch.int32, torch.int64),
        f"topk_ids must be int32 or int64, got {topk_ids.dtype}",
    )
    require(
        topk_weights.shape == topk_ids.shape and topk_weights.is_floating_point(),
        f"topk_weights must be float {tuple(topk_ids.shape)} like topk_ids, "
        f"got {topk_weights.dtype} {tuple(topk_weights.shape)}",
    )
    require(
        similarity.dim() == 2
        and similarity.shape[0] == similarity.shape[1] > 0
        and similarity.dtype == torch.float32,
        f"similarity must be float32 [E, E], got {similarity.dtype} {tuple(similarity.shape)}",
    )
    num_rows, num_experts = topk_ids.shape[0], similarity.shape[0]
    if row_kind is not None:
        require(
            row_kind.shape == (num_rows,) and row_kind.dtype == torch.int8,
            f"row_kind must be int8 [{num_rows}], got {row_kind.dtype} {tuple(row_kind.shape)}",
        )
    if unavailable is not None:
        require(
            unavailable.shape == (num_experts,) and unavailable.dtype == torch.bool,
            f"unavailable must be bool [{num_experts}], "
            f"got {unavailable.dtype} {tuple(unavailable.shape)}",
        )
