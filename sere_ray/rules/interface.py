"""One interface for every rule, and what most rules share.

A rule is ``rule(topk_ids, topk_weights, scores, row_kind, layer) -> (topk_ids, topk_weights)``,
pure torch. Leading dimensions are steps that know nothing of each other: ``[..., T, K]``.

Rules other than ``sere`` agree on what follows. Rows that are not re-routable come out bit for bit,
and so do re-routable rows whose experts are all kept. The experts of exact rows are read anyway
and therefore always kept. A re-routable row with a sentinel among its ids counts as exact.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sere_ray.rules.sere import PADDING, REROUTABLE

Choice = tuple[Tensor, Tensor]
"""``topk_ids`` and ``topk_weights``, ``[..., T, K]`` each. A dropped slot is id -1, weight 0."""


@dataclass(frozen=True)
class Layer:
    """What a rule knows of a layer beside its rows; each rule reads the knobs it has.

    Attributes:
        num_experts: E.
        similarity: ``[E, E]`` float32, for ``sere``.
        select_top_k: S of ``sere`` and ``topk``, k0 of ``oea``.
        threshold: rho of ``sere``.
        min_primary_experts: m of ``sere`` and ``margin``.
        experts: n of ``xshare`` and ``lynx``, a number of kept experts.
        max_per_rank: of ``xshare``, how many of them a rank may hold; None = any number.
        owner: ``[E]`` int64, the expert-parallel rank of each expert, for ``max_per_rank`` and
            ``balance_ranks``; None = one rank holds them all.
        alpha: of ``lynx``, bins per unit of logit.
        base: of ``lynx``, what a bin's score is a power of.
        depth: of ``lynx``, the last bin.
        tau: of ``margin``, least demand of a kept expert.
        beta: of ``margin``, 1 = weights renormalised, 0 = the gate's scale.
        fill: of ``margin``, factor of the weight of a stand-in.
        runners_up: of ``margin``, how many unchosen experts a chosen one is compared with.
        balance_ranks: of ``margin``, whether tau counts what the busiest rank reads.
    """

    num_experts: int
    similarity: Tensor | None = None
    select_top_k: int = 0
    threshold: float | None = None
    min_primary_experts: int = 0
    experts: int = 0
    max_per_rank: int | None = None
    owner: Tensor | None = None
    alpha: float = 2.0
    base: float = 2.0
    depth: int = 8
    tau: float = 0.0
    beta: float = 0.5
    fill: float = 0.5
    runners_up: int = 8
    balance_ranks: bool = False


Rule = Callable[[Tensor, Tensor, Tensor | None, Tensor, Layer], Choice]
"""Arguments: ``topk_ids [..., T, K]`` int; ``topk_weights [..., T, K]`` float; ``scores
[..., T, E]`` float32 in 0..1, what the gate ranks experts by (None where the rule needs none);
``row_kind [..., T]`` int8; the layer."""


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


def refill(
    kept: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor,
    row_kind: Tensor,
    *,
    beta: float = 1.0,
    fill: float = 1.0,
) -> Choice:
    """Rows take their own best-scored kept experts, distinct ones: first those they had.

    Equal scores: the lowest index.

    The weight of expert v is ``W p_v / (Z^beta Z_K^(1 - beta))``: p the score, times ``fill`` for a
    stand-in; Z the sum of p over what the row takes, Z_K over what it had; W the sum of its former
    weights. So beta = 1 renormalises, and a factor common to a row's scores changes nothing. A row
    that finds fewer than K drops slots.

    Args:
        kept: ``[..., E]`` bool.
        topk_ids: ``[..., T, K]``.
        topk_weights: ``[..., T, K]``.
        scores: ``[..., T, E]``, above 0 wherever the gate may go.
        row_kind: ``[..., T]``.
        beta: see above.
        fill: see above.
    """
    num_slots, num_experts = topk_ids.shape[-1], kept.shape[-1]
    of_rows = kept[..., None, :].expand(scores.shape)
    changeable = changeable_rows(topk_ids, row_kind, num_experts)
    old = torch.where(changeable[..., None], topk_ids, 0).long()
    unserved = changeable & ~of_rows.gather(-1, old).all(dim=-1)

    ids, weights = topk_ids[unserved].long(), topk_weights[unserved]  # [U, K]
    before = scores[unserved].gather(1, ids).sum(dim=1, keepdim=True)
    own = torch.zeros_like(scores[unserved], dtype=torch.bool).scatter_(1, ids, True)
    p = torch.where(own, scores[unserved], fill * scores[unserved])
    # The bits of floats in 0..1 are in their order, and below 2^30.
    rank_by = scores[unserved].view(torch.int32) + own.int() * 2**30
    rank_by = rank_by.masked_fill(~of_rows[unserved], -1)
    new_ids = rank_by.argsort(dim=1, descending=True, stable=True)[:, :num_slots]
    taken = rank_by.gather(1, new_ids) >= 0
    p = torch.where(taken, p.gather(1, new_ids), 0.0)
    scale = p.sum(dim=1, keepdim=True) ** beta * before ** (1 - beta)
    new_weights = torch.where(taken, p * weights.sum(dim=1, keepdim=True) / scale, 0.0)

    all_ids, all_weights = topk_ids.clone(), topk_weights.clone()
    all_ids[unserved] = torch.where(taken, new_ids, -1).to(topk_ids.dtype)
    all_weights[unserved] = new_weights.to(topk_weights.dtype)
    return all_ids, all_weights


def name_dropped(topk_ids: Tensor, before: Tensor) -> Tensor:
    """Give dropped slots, whose weight is 0, an expert that the row reads anyway.

    For experts' code that takes no id of -1.

    Args:
        topk_ids: ``[..., T, K]`` after a rule.
        before: the same before it; what was no expert there stays.
    """
    first = topk_ids.gather(-1, (topk_ids >= 0).to(torch.int8).argmax(dim=-1, keepdim=True))
    return torch.where((topk_ids < 0) & (before >= 0), first, topk_ids)
