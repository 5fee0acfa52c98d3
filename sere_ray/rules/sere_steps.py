"""The same rule for many decode steps at once, on any device, as the evaluator needs it.

The reference takes one step. Here leading dimensions are steps that know nothing of each other;
`tests/rules` holds both to the same integers.
"""

import torch
from torch import Tensor

from sere_ray.rules.sere import EXACT, PADDING


def reroute_steps(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    row_kind: Tensor,
    *,
    select_top_k: int,
    threshold: float | None = None,
    min_primary_experts: int = 0,
) -> Tensor:
    """:func:`sere_ray.reroute` of ``[..., T, K]``; ``row_kind`` is ``[..., T]``.

    Memory: a byte for each step and pair of experts.
    """
    num_slots, num_experts = topk_ids.shape[-1], len(similarity)
    if not 0 < select_top_k < num_slots:
        return topk_ids.clone()
    valid = (topk_ids >= 0) & (topk_ids < num_experts) & (row_kind != PADDING)[..., None]
    ids = torch.where(valid, topk_ids, num_experts).long()
    lowest = _lowest_ranks(ids, torch.where(valid, topk_weights, -torch.inf), row_kind, num_experts)
    size = _sizes(lowest, select_top_k, min_primary_experts, num_slots)
    primary = lowest < size[..., None]
    target = _targets(primary, similarity, threshold)
    slots = ids.clamp(max=num_experts - 1).flatten(-2)
    new_ids = target.gather(-1, slots).view_as(ids).to(topk_ids.dtype)
    return torch.where(valid, new_ids, topk_ids)


def _lowest_ranks(ids: Tensor, weights: Tensor, row_kind: Tensor, num_experts: int) -> Tensor:
    """``[..., E]``: the best rank that a row gives each expert, K where none names it."""
    num_slots = ids.shape[-1]
    order = weights.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(num_slots, device=ids.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    rank = rank.masked_fill((row_kind == EXACT)[..., None], 0)
    lowest = rank.new_full((*ids.shape[:-2], num_experts + 1), num_slots)
    lowest.scatter_reduce_(-1, ids.flatten(-2), rank.flatten(-2), "amin")
    return lowest[..., :num_experts]


def _sizes(lowest: Tensor, select_top_k: int, floor: int, num_slots: int) -> Tensor:
    """``[...]``: S, raised until the primary set holds min(floor, all named) experts."""
    named_at = lowest.new_zeros((*lowest.shape[:-1], num_slots + 1))
    named_at.scatter_add_(-1, lowest, torch.ones_like(lowest))
    held = named_at[..., :num_slots].cumsum(-1)
    enough = held[..., -1:].clamp(max=min(max(floor, 0), lowest.shape[-1]))
    too_small = (held < enough).sum(dim=-1)
    return (too_small + 1).clamp(min=select_top_k)


def _targets(primary: Tensor, similarity: Tensor, threshold: float | None) -> Tensor:
    """``[..., E]``: where a slot of each expert goes; equally similar: the lowest index."""
    itself = torch.arange(len(similarity), device=similarity.device)
    by_likeness = similarity.argsort(dim=1, descending=True, stable=True)
    nearest = primary[..., by_likeness].to(torch.uint8).argmax(dim=-1)
    stand_in = by_likeness[itself, nearest]
    stays = primary | ~primary.any(dim=-1, keepdim=True)
    if threshold is not None:
        rho = torch.tensor(threshold, dtype=torch.float32, device=similarity.device)
        stays = stays | (similarity[itself, stand_in] < rho)
    return torch.where(stays, itself, stand_in)
