"""What several rules share: which rows may change, which experts are kept, what rows then take."""

import torch
from torch import Tensor

from sere_ray.rules.gate import NEVER
from sere_ray.rules.interface import PADDING, REROUTABLE, Choice, Layer


def need_scores(scores: Tensor | None) -> Tensor:
    """The scores of a rule that cannot do without.

    Raises:
        ValueError: they are None.
    """
    if scores is None:
        raise ValueError("this rule needs the gate's scores [..., T, E], got None")
    return scores


def changeable_rows(topk_ids: Tensor, row_kind: Tensor, num_experts: int) -> Tensor:
    """``[..., T]`` bool: re-routable rows without a sentinel."""
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    return (row_kind == REROUTABLE) & valid.all(dim=-1)


def named_by(topk_ids: Tensor, rows: Tensor, num_experts: int) -> Tensor:
    """``[..., E]`` bool: experts among the ids ``[..., T, k]`` of the rows ``[..., T]``."""
    valid = (topk_ids >= 0) & (topk_ids < num_experts) & rows[..., None]
    bins = torch.where(valid, topk_ids, num_experts).long().flatten(-2)
    named = bins.new_zeros((*bins.shape[:-1], num_experts + 1), dtype=torch.bool)
    return named.scatter_(-1, bins, True)[..., :num_experts]


def read_anyway(topk_ids: Tensor, row_kind: Tensor, num_experts: int) -> Tensor:
    """``[..., E]`` bool: experts of rows that no rule changes, padding left out."""
    fixed = ~changeable_rows(topk_ids, row_kind, num_experts) & (row_kind != PADDING)
    return named_by(topk_ids, fixed, num_experts)


def by_weight(topk_ids: Tensor, topk_weights: Tensor, count: int) -> Tensor:
    """``[..., T, count]``: each row's ids of largest weight; equal weights by slot order."""
    order = topk_weights.argsort(dim=-1, descending=True, stable=True)
    return topk_ids.gather(-1, order[..., :count])


def top_of_rows(
    topk_ids: Tensor, topk_weights: Tensor, row_kind: Tensor, layer: Layer, count: int
) -> Tensor:
    """``[..., E]`` bool: the best ``count`` of every re-routable row, and what is read anyway."""
    rows = changeable_rows(topk_ids, row_kind, layer.num_experts)
    best = by_weight(topk_ids, topk_weights, count)
    return named_by(best, rows, layer.num_experts) | read_anyway(
        topk_ids, row_kind, layer.num_experts
    )


def best_experts(first: Tensor, demand: Tensor, count: int) -> Tensor:
    """``first``, and the experts of most demand until ``count`` are kept; ``[..., E]`` bool.

    Equal demand: the lowest index. If ``first`` holds ``count`` or more, nothing is added.
    """
    best = torch.zeros_like(first)
    best.scatter_(-1, by_demand(first, demand)[..., :count], True)
    return first | best


def by_demand(first: Tensor, demand: Tensor) -> Tensor:
    """``[..., E]`` int64: experts in the order they are kept in, ``first`` before all others."""
    worth = demand.double().masked_fill(first, torch.inf)
    return worth.argsort(dim=-1, descending=True, stable=True)


def held(kept: Tensor, named: Tensor, wanted: Tensor, layer: Layer) -> Tensor:
    """``[..., E]`` bool: under ``guard`` all named experts where too much demand is given up.

    Args:
        kept: ``[..., E]`` bool, by the rule.
        named: ``[..., E]`` bool, by somebody.
        wanted: ``[..., E]`` int64, demand.
        layer: ``most`` is the most that is not too much.
    """
    if not layer.guard or layer.most is None:
        return kept
    return kept | (named & (given_up(kept, named, wanted) > layer.most)[..., None])


def given_up(kept: Tensor, named: Tensor, wanted: Tensor) -> Tensor:
    """``[...]`` int64: demand for named experts that are not kept; arguments as of :func:`held`."""
    return wanted.masked_fill(kept | ~named, 0).sum(dim=-1)


def place_in_rank(order: Tensor, owner: Tensor | None) -> Tensor:
    """``[..., E]`` int64: how many experts of an expert's own rank come before it.

    Args:
        order: ``[..., E]`` int64, experts from first to last.
        owner: ``[E]`` int64, the rank that holds each expert; None = one rank holds all.
    """
    rank = torch.zeros_like(order) if owner is None else owner.to(order.device)[order]
    of_ranks = torch.nn.functional.one_hot(rank).cumsum(dim=-2)  # [..., E, ranks]
    place = of_ranks.gather(-1, rank[..., None]).squeeze(-1) - 1
    return torch.empty_like(order).scatter_(-1, order, place)


def refill(
    kept: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor,
    row_kind: Tensor,
    *,
    beta: float = 1.0,
    fill: float = 1.0,
    ranks: Tensor | None = None,
) -> Choice:
    """Rows take their own best-ranked kept experts, distinct ones: first those they had.

    Equal ranks: the lowest index.

    The weight of expert v is ``W p_v / (Z^beta Z_K^(1 - beta))``: p the score, times ``fill`` for a
    stand-in; Z the sum of p over what the row takes, Z_K over what it had; W the sum of its former
    weights. So beta = 1 renormalises, and a factor common to a row's scores changes nothing. A row
    that finds fewer than K drops slots. Where all scores of what it takes are 0, it shares W out.

    Args:
        kept: ``[..., E]`` bool.
        topk_ids: ``[..., T, K]``.
        topk_weights: ``[..., T, K]``.
        scores: ``[..., T, E]``, above 0 wherever the gate may go.
        row_kind: ``[..., T]``.
        beta: see above.
        fill: see above.
        ranks: ``[..., T, E]`` int64, what the gate ranks by, :data:`NEVER` where a row may not
            choose; None = the scores, which are then at most 1.
    """
    num_slots, num_experts = topk_ids.shape[-1], kept.shape[-1]
    of_rows = kept[..., None, :].expand(scores.shape)
    changeable = changeable_rows(topk_ids, row_kind, num_experts)
    old = torch.where(changeable[..., None], topk_ids, 0).long()
    unserved = changeable & ~of_rows.gather(-1, old).all(dim=-1)

    ids, weights = topk_ids[unserved].long(), topk_weights[unserved]  # [U, K]
    before = sum_of_slots(scores[unserved].gather(1, ids))
    own = torch.zeros_like(scores[unserved], dtype=torch.bool).scatter_(1, ids, True)
    p = torch.where(own, scores[unserved], fill * scores[unserved])
    # The bits of floats in 0..1 are in their order; these and ranks are within 2^30 of 0.
    worth = (scores.view(torch.int32) if ranks is None else ranks)[unserved].long()
    of_unserved = of_rows[unserved] & (worth > NEVER)
    worth = (worth + own.long() * 2**31).masked_fill(~of_unserved, NEVER)
    new_ids = worth.argsort(dim=1, descending=True, stable=True)[:, :num_slots]
    taken = worth.gather(1, new_ids) > NEVER
    p = torch.where(taken, p.gather(1, new_ids), 0.0)
    total = sum_of_slots(p)
    is_lost = total == 0
    p = torch.where(is_lost & taken, 1.0, p)
    scale = power(total, beta) * power(before, 1 - beta)
    scale = torch.where(is_lost, taken.sum(dim=1, keepdim=True).float(), scale)
    new_weights = torch.where(taken, p * sum_of_slots(weights) / scale, 0.0)

    all_ids, all_weights = topk_ids.clone(), topk_weights.clone()
    all_ids[unserved] = torch.where(taken, new_ids, -1).to(topk_ids.dtype)
    all_weights[unserved] = new_weights.to(topk_weights.dtype)
    return all_ids, all_weights


def sum_of_slots(values: Tensor) -> Tensor:
    """``[rows, 1]`` float32 of ``[rows, K]``: slot by slot, as float sums have an order."""
    total = torch.zeros_like(values[:, :1], dtype=torch.float32)
    for slot in range(values.shape[1]):
        total = total + values[:, slot, None].float()
    return total


def power(base: Tensor, exponent: float) -> Tensor:
    """Of float32. Computed in float64: of float32 every library has a power of its own."""
    return (base.double() ** exponent).float()


def name_dropped(topk_ids: Tensor, before: Tensor) -> Tensor:
    """Give dropped slots, whose weight is 0, an expert that the row reads anyway.

    For experts' code that takes no id of -1.

    Args:
        topk_ids: ``[..., T, K]`` after a rule.
        before: the same before it; what was no expert there stays.
    """
    first = topk_ids.gather(-1, (topk_ids >= 0).to(torch.int8).argmax(dim=-1, keepdim=True))
    return torch.where((topk_ids < 0) & (before >= 0), first, topk_ids)
