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
UNNAMED = 255
"""Entry of a rank vector for an expert that no row of the rank names; so K <= 254."""


def reroute(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    *,
    row_kind: Tensor | None = None,
    select_top_k: int,
    threshold: float | None = None,
    min_primary_experts: int = 0,
) -> Tensor:
    """Re-route secondary expert choices to the most similar expert the batch reads anyway.

    Args:
        topk_ids: ``[T, K]`` int32 or int64, the gate's choices. An id outside ``0 <= id < E``
            is a sentinel (for instance -1) and stays as it is.
        topk_weights: ``[T, K]`` float, finite; ranks the slots of a row, is never changed.
        similarity: ``[E, E]`` float32, finite; row u says how well each v stands in for u.
        row_kind: ``[T]`` int8 of ``PADDING``, ``REROUTABLE``, ``EXACT``; None = all re-routable.
        select_top_k: S, how many of a row's best slots are primary. ``S <= 0`` and ``S >= K``
            change nothing.
        threshold: rho; a stand-in less similar than this is refused and the expert is kept as a
            critical one. Rounded to float32 once. None = every stand-in is accepted.
        min_primary_experts: m; raises S until the primary set holds min(m, |P_K|) experts.

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
    _check(topk_ids, topk_weights, similarity, row_kind)
    if not 0 < select_top_k < topk_ids.shape[1]:
        return topk_ids.clone()
    plan = make_plan(
        topk_ids,
        topk_weights,
        similarity,
        row_kind=row_kind,
        select_top_k=select_top_k,
        threshold=threshold,
        min_primary_experts=min_primary_experts,
    )
    return apply_plan(plan, topk_ids, row_kind)


class Plan(NamedTuple):
    """What one layer does in one step: everything the rule derives before it touches a slot."""

    named: Tensor
    """``[E]`` bool: experts that a re-routable or exact row names."""
    primary: Tensor
    """``[E]`` bool: P, the experts every other choice is re-routed to."""
    target: Tensor
    """``[E]`` int64: where a slot goes. In exact rows, too: their experts are in P and stay."""


def make_plan(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    *,
    row_kind: Tensor | None,
    select_top_k: int,
    threshold: float | None = None,
    min_primary_experts: int = 0,
) -> Plan:
    """Steps 1 to 4 of the specification; arguments as for :func:`reroute`."""
    _check(topk_ids, topk_weights, similarity, row_kind)
    return plan_from_ranks(
        lowest_slot_rank(topk_ids, topk_weights, similarity.shape[0], row_kind),
        similarity,
        num_slots=topk_ids.shape[1],
        select_top_k=select_top_k,
        threshold=threshold,
        min_primary_experts=min_primary_experts,
    )


def plan_from_ranks(
    ranks: Tensor,
    similarity: Tensor,
    *,
    num_slots: int,
    select_top_k: int,
    threshold: float | None = None,
    min_primary_experts: int = 0,
) -> Plan:
    """The same from the rank vector of all rows, wherever they are.

    Args:
        ranks: ``[E]``, a :func:`rank_vector`, or the elementwise minimum over several; every
            value from ``num_slots`` on means that no row names the expert.
        similarity: as for :func:`reroute`, and so are the others.
        num_slots: K.
        select_top_k: S.
        threshold: rho.
        min_primary_experts: m.
    """
    active = 0 < select_top_k < num_slots
    itself = torch.arange(similarity.shape[0], device=similarity.device)

    lowest_rank = ranks.long().clamp(max=num_slots)
    named = lowest_rank < num_slots
    size = select_top_k if active else num_slots
    primary = primary_set(lowest_rank, size, min_primary_experts, num_slots)

    target = itself
    if active:
        best, stand_in = similarity.masked_fill(~primary, -torch.inf).max(dim=1)  # lowest index
        stays = primary | (best == -torch.inf)  # -inf: P is empty
        if threshold is not None:
            rho = torch.tensor(threshold, dtype=torch.float32, device=best.device)
            stays = stays | (best < rho)
        target = torch.where(stays, itself, stand_in)
    return Plan(named, primary, target)


def apply_plan(plan: Plan, topk_ids: Tensor, row_kind: Tensor | None) -> Tensor:
    """Steps 4 and 5 on every slot. Returns a new ``[T, K]`` tensor."""
    valid = _is_valid(topk_ids, plan.named.shape[0])
    if row_kind is not None:
        valid = valid & (row_kind != PADDING)[:, None]
    new_ids = plan.target[torch.where(valid, topk_ids, 0).long()]
    return torch.where(valid, new_ids.to(topk_ids.dtype), topk_ids)


def lowest_slot_rank(
    topk_ids: Tensor, topk_weights: Tensor, num_experts: int, row_kind: Tensor | None
) -> Tensor:
    """Steps 1 and 2: per expert, the best rank any row gives it; P_s = the entries below s.

    An exact row counts as rank 0 for each of its experts, since they are read anyway.

    Returns:
        ``[E]`` int64: 0..K-1, or K where no re-routable or exact row names the expert.
    """
    num_slots = topk_ids.shape[1]
    valid = _is_valid(topk_ids, num_experts)
    by_weight = torch.where(valid, topk_weights, -torch.inf)
    order = by_weight.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(num_slots, device=topk_ids.device).expand_as(order)
    if row_kind is not None:
        valid = valid & (row_kind != PADDING)[:, None]
        rank = rank.masked_fill((row_kind == EXACT)[:, None], 0)
    # What names no expert goes to a bin of its own behind the last one.
    ids = torch.where(valid, topk_ids, num_experts).long().gather(1, order)
    lowest = torch.full((num_experts + 1,), num_slots, device=topk_ids.device)
    return lowest.scatter_reduce_(0, ids.flatten(), rank.flatten(), "amin")[:num_experts]


def rank_vector(
    topk_ids: Tensor, topk_weights: Tensor, num_experts: int, row_kind: Tensor | None
) -> Tensor:
    """What expert-parallel ranks exchange: the same as one byte per expert, reduced with MIN.

    Returns:
        ``[E]`` uint8: 0..K-1, or ``UNNAMED``.
    """
    check_slots(topk_ids.shape[1])
    lowest = lowest_slot_rank(topk_ids, topk_weights, num_experts, row_kind)
    return lowest.masked_fill(lowest == topk_ids.shape[1], UNNAMED).to(torch.uint8)


def check_slots(num_slots: int) -> None:
    """Refuse a K whose ranks do not fit the byte of a rank vector.

    Raises:
        ValueError: K > 254.
    """
    if num_slots >= UNNAMED:
        raise ValueError(f"topk_ids has {num_slots} slots; a rank vector holds up to {UNNAMED - 1}")


def primary_set(lowest_rank: Tensor, select_top_k: int, floor: int, num_slots: int) -> Tensor:
    """Step 3: P = P_S_eff, S_eff the smallest s >= S with ``|P_s| >= min(floor, |P_K|)``.

    Returns:
        ``[E]`` bool.
    """
    if floor <= 0 or select_top_k >= num_slots:
        return lowest_rank < select_top_k
    zeros = torch.zeros(num_slots + 1, dtype=torch.long, device=lowest_rank.device)
    new_at_rank = zeros.scatter_add_(0, lowest_rank, torch.ones_like(lowest_rank))
    size = new_at_rank[:num_slots].cumsum(0)  # size[s - 1] = |P_s|, rising with s
    enough = size[-1].clamp(max=min(floor, lowest_rank.shape[0]))
    too_small = (size < enough).sum()
    return lowest_rank < (too_small + 1).clamp(min=select_top_k)


class RuleCounts(NamedTuple):
    """What the rule did in one layer of one step; 0-d int64 tensors, no host synchronisation."""

    experts_before: Tensor
    """Distinct experts that non-padding rows name before the rule."""
    experts_after: Tensor
    """The same after the rule: what the layer reads from memory."""
    slots_rerouted: Tensor
    """Slots of non-padding rows whose expert changed."""
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
    nowhere = torch.zeros(num_experts + 1, dtype=torch.bool, device=new_ids.device)
    read = nowhere.scatter_(0, torch.where(plan.named, plan.target, num_experts), True)
    before, after, primary = torch.stack((plan.named, read[:-1], plan.primary)).sum(dim=1).unbind()
    changed = new_ids != topk_ids
    if row_kind is not None:
        changed = changed & (row_kind != PADDING)[:, None]
    return RuleCounts(before, after, changed.sum(), after - primary)


def _is_valid(ids: Tensor, num_experts: int) -> Tensor:
    return (ids >= 0) & (ids < num_experts)


def _check(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    row_kind: Tensor | None,
) -> None:
    if topk_ids.dim() != 2:
        raise ValueError(f"topk_ids must be [T, K], got shape {tuple(topk_ids.shape)}")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if topk_weights.shape != topk_ids.shape or not topk_weights.is_floating_point():
        raise ValueError(
            f"topk_weights must be float {tuple(topk_ids.shape)} like topk_ids, "
            f"got {topk_weights.dtype} {tuple(topk_weights.shape)}"
        )
    square = similarity.dim() == 2 and similarity.shape[0] == similarity.shape[1] > 0
    if not square or similarity.dtype != torch.float32:
        raise ValueError(
            f"similarity must be float32 [E, E], got {similarity.dtype} {tuple(similarity.shape)}"
        )
    num_rows = topk_ids.shape[0]
    if row_kind is not None and (row_kind.shape != (num_rows,) or row_kind.dtype != torch.int8):
        raise ValueError(
            f"row_kind must be int8 [{num_rows}], got {row_kind.dtype} {tuple(row_kind.shape)}"
        )
