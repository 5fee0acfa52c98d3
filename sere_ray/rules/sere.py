"""The rule ``sere`` (arXiv 2602.07616) for a continuous-batching server: the reference.

This file is the specification in torch; docs/quality.md has its five steps in words. Every other
implementation must give the same integers. T rows (tokens), K slots of a row, E logical experts.
The *slot order* of a slot is its place among those of its row, 0 for the largest weight.

Leading dimensions, ``[..., T, K]``, are steps that know nothing of each other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sere_ray.rules.interface import EXACT, PADDING, Choice, Layer
from sere_ray.rules.merging import merge_repeated

UNNAMED = 255
"""Byte of an expert that no row of a rank names; so K <= 254."""


def sere(
    topk_ids: Tensor, topk_weights: Tensor, scores: Tensor | None, row_kind: Tensor, layer: Layer
) -> Choice:
    """:func:`reroute` as one rule among others; then :func:`merge_repeated`, where it did anything.

    Raises:
        ValueError: the layer has no similarity.
    """
    del scores
    if layer.similarity is None:
        raise ValueError("the rule 'sere' needs the similarity of the layer, got None")
    new_ids = reroute(
        topk_ids,
        topk_weights,
        layer.similarity,
        row_kind=row_kind.expand(topk_ids.shape[:-1]),
        select_top_k=layer.select_top_k,
        threshold=layer.threshold,
        min_primary_experts=layer.min_primary_experts,
    )
    if not 0 < layer.select_top_k < topk_ids.shape[-1]:
        return new_ids, topk_weights.clone()
    return merge_repeated(new_ids, topk_weights, row_kind=row_kind, num_experts=layer.num_experts)


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
        topk_ids: ``[..., T, K]`` int32 or int64, the gate's choices. An id outside
            ``0 <= id < E`` is a sentinel (for instance -1) and stays as it is.
        topk_weights: ``[..., T, K]`` float, finite; orders the slots of a row, is never changed.
        similarity: ``[E, E]`` float32, finite; row u says how well each v stands in for u.
        row_kind: ``[..., T]`` int8 of ``PADDING``, ``REROUTABLE``, ``EXACT``; None = all
            re-routable.
        select_top_k: S, how many of a row's best slots are primary. ``S <= 0`` and ``S >= K``
            change nothing.
        threshold: rho; a stand-in less similar than this is refused and the expert is kept as a
            critical one. Rounded to float32 once. None = every stand-in is accepted.
        min_primary_experts: m; raises S until the primary set holds min(m, |P_K|) experts.

    Returns:
        ``[..., T, K]`` new tensor of the dtype of ``topk_ids``.

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
    if not 0 < select_top_k < topk_ids.shape[-1]:
        return topk_ids.clone()
    rerouting = find_rerouting(
        topk_ids,
        topk_weights,
        similarity,
        row_kind=row_kind,
        select_top_k=select_top_k,
        threshold=threshold,
        min_primary_experts=min_primary_experts,
    )
    return apply_rerouting(rerouting, topk_ids, row_kind)


class Rerouting(NamedTuple):
    """What a layer does in a step: everything the rule derives before it touches a slot."""

    named: Tensor
    """``[..., E]`` bool: experts that a re-routable or exact row names."""
    primary: Tensor
    """``[..., E]`` bool: P, the experts every other choice is re-routed to."""
    target: Tensor
    """``[..., E]`` int64: where a slot goes. In exact rows, too: their experts are in P and stay.
    """


def find_rerouting(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    *,
    row_kind: Tensor | None,
    select_top_k: int,
    threshold: float | None = None,
    min_primary_experts: int = 0,
) -> Rerouting:
    """Steps 1 to 4, per expert; arguments as for :func:`reroute`.

    Memory: a float for each step and pair of experts.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    _check(topk_ids, topk_weights, similarity, row_kind)
    return rerouting_of_slot_orders(
        lowest_slot_order(topk_ids, topk_weights, similarity.shape[0], row_kind),
        similarity,
        num_slots=topk_ids.shape[-1],
        select_top_k=select_top_k,
        threshold=threshold,
        min_primary_experts=min_primary_experts,
    )


def lowest_slot_order(
    topk_ids: Tensor, topk_weights: Tensor, num_experts: int, row_kind: Tensor | None
) -> Tensor:
    """Steps 1 and 2: per expert, the best slot order any row gives it; P_s = the entries below s.

    In an exact row it is 0 for every expert, since they are read anyway.

    Returns:
        ``[..., E]`` int64: 0..K-1, or K where no re-routable or exact row names the expert.
    """
    num_slots = topk_ids.shape[-1]
    valid = _is_valid(topk_ids, num_experts)
    by_weight = torch.where(valid, topk_weights, -torch.inf)
    slots = by_weight.argsort(dim=-1, descending=True, stable=True)
    order = torch.arange(num_slots, device=topk_ids.device).expand_as(slots)
    if row_kind is not None:
        valid = valid & (row_kind != PADDING)[..., None]
        order = order.masked_fill((row_kind == EXACT)[..., None], 0)
    # What names no expert goes to a bin of its own behind the last one.
    ids = torch.where(valid, topk_ids, num_experts).long().gather(-1, slots)
    lowest = order.new_full((*ids.shape[:-2], num_experts + 1), num_slots)
    lowest.scatter_reduce_(-1, ids.flatten(-2), order.flatten(-2), "amin")
    return lowest[..., :num_experts]


def rerouting_of_slot_orders(
    orders: Tensor,
    similarity: Tensor,
    *,
    num_slots: int,
    select_top_k: int,
    threshold: float | None = None,
    min_primary_experts: int = 0,
) -> Rerouting:
    """Steps 3 and 4 from the slot orders of all rows, wherever they are.

    Args:
        orders: ``[..., E]``, a :func:`lowest_slot_order`, or the minimum of several
            :func:`slot_order_bytes`; from ``num_slots`` on no row names the expert.
        similarity: ``[E, E]`` float32.
        num_slots: K.
        select_top_k: S.
        threshold: rho.
        min_primary_experts: m.
    """
    lowest = orders.long().clamp(max=num_slots)
    named = lowest < num_slots
    itself = torch.arange(similarity.shape[0], device=similarity.device)
    if not 0 < select_top_k < num_slots:
        return Rerouting(named, named, itself.expand_as(lowest))
    primary = primary_set(lowest, select_top_k, min_primary_experts, num_slots)
    candidates = similarity.masked_fill(~primary[..., None, :], -torch.inf)
    best, stand_in = candidates.max(dim=-1)  # lowest index
    stays = primary | (best == -torch.inf)  # -inf: P is empty
    if threshold is not None:
        rho = torch.tensor(threshold, dtype=torch.float32, device=best.device)
        stays = stays | (best < rho)
    return Rerouting(named, primary, torch.where(stays, itself, stand_in))


def primary_set(lowest: Tensor, select_top_k: int, floor: int, num_slots: int) -> Tensor:
    """Step 3: P = P_S_eff, S_eff the smallest s >= S with ``|P_s| >= min(floor, |P_K|)``.

    Args:
        lowest: ``[..., E]`` int64, a :func:`lowest_slot_order`.
        select_top_k: S.
        floor: m.
        num_slots: K.

    Returns:
        ``[..., E]`` bool.
    """
    if floor <= 0:
        return lowest < select_top_k
    zeros = lowest.new_zeros((*lowest.shape[:-1], num_slots + 1))
    new_at_order = zeros.scatter_add_(-1, lowest, torch.ones_like(lowest))
    size = new_at_order[..., :num_slots].cumsum(dim=-1)  # size[s - 1] = |P_s|, rising with s
    enough = size[..., -1:].clamp(max=min(floor, lowest.shape[-1]))
    too_small = (size < enough).sum(dim=-1, keepdim=True)
    return lowest < (too_small + 1).clamp(min=select_top_k)


def apply_rerouting(rerouting: Rerouting, topk_ids: Tensor, row_kind: Tensor | None) -> Tensor:
    """Steps 4 and 5 on every slot. Returns a new ``[..., T, K]`` tensor."""
    valid = _is_valid(topk_ids, rerouting.named.shape[-1])
    if row_kind is not None:
        valid = valid & (row_kind != PADDING)[..., None]
    ids = torch.where(valid, topk_ids, 0).long()
    new_ids = rerouting.target.gather(-1, ids.flatten(-2)).view_as(ids)
    return torch.where(valid, new_ids.to(topk_ids.dtype), topk_ids)


def slot_order_bytes(
    topk_ids: Tensor, topk_weights: Tensor, num_experts: int, row_kind: Tensor | None
) -> Tensor:
    """What expert-parallel ranks exchange: the same as one byte per expert, reduced with MIN.

    Returns:
        ``[..., E]`` uint8: 0..K-1, or ``UNNAMED``.

    Raises:
        ValueError: K > 254.
    """
    check_slots(topk_ids.shape[-1])
    lowest = lowest_slot_order(topk_ids, topk_weights, num_experts, row_kind)
    return lowest.masked_fill(lowest == topk_ids.shape[-1], UNNAMED).to(torch.uint8)


def check_slots(num_slots: int) -> None:
    """Refuse a K whose slot orders do not fit a byte.

    Raises:
        ValueError: K > 254.
    """
    if num_slots >= UNNAMED:
        raise ValueError(f"topk_ids has {num_slots} slots; slot orders in a byte go up to 254")


def _is_valid(ids: Tensor, num_experts: int) -> Tensor:
    return (ids >= 0) & (ids < num_experts)


def _check(
    topk_ids: Tensor, topk_weights: Tensor, similarity: Tensor, row_kind: Tensor | None
) -> None:
    shape = tuple(topk_ids.shape)
    if topk_ids.dim() < 2:
        raise ValueError(f"topk_ids must be [..., T, K], got shape {shape}")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if topk_weights.shape != topk_ids.shape or not topk_weights.is_floating_point():
        raise ValueError(
            f"topk_weights must be float {shape} like topk_ids, "
            f"got {topk_weights.dtype} {tuple(topk_weights.shape)}"
        )
    square = similarity.dim() == 2 and similarity.shape[0] == similarity.shape[1] > 0
    if not square or similarity.dtype != torch.float32:
        raise ValueError(
            f"similarity must be float32 [E, E], got {similarity.dtype} {tuple(similarity.shape)}"
        )
    if row_kind is not None and (row_kind.shape != shape[:-1] or row_kind.dtype != torch.int8):
        raise ValueError(
            f"row_kind must be int8 {list(shape[:-1])}, "
            f"got {row_kind.dtype} {tuple(row_kind.shape)}"
        )
