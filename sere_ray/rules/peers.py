"""The rules that ours are compared with, as published; where a paper is silent, it says so here.

None of them knows row kinds: that exact rows keep their experts, and pay for them, is ours
(:mod:`sere_ray.rules.interface`). Weights of a row keep their former sum, which is 1 in models that
renormalise.
"""

import torch
from torch import Tensor

from sere_ray.rules.common import (
    best_experts,
    by_demand,
    changeable_rows,
    need_scores,
    place_in_rank,
    refill,
    top_of_rows,
)
from sere_ray.rules.interface import Choice, Layer


def topk(
    topk_ids: Tensor, topk_weights: Tensor, scores: Tensor | None, row_kind: Tensor, layer: Layer
) -> Choice:
    """Each row's S slots of largest weight, rescaled to the row's former sum; no batch is seen."""
    del scores
    size = layer.select_top_k
    if not 0 < size < topk_ids.shape[-1]:
        return topk_ids.clone(), topk_weights.clone()
    slots = topk_weights.argsort(dim=-1, descending=True, stable=True)
    order = torch.empty_like(slots)
    order.scatter_(-1, slots, torch.arange(slots.shape[-1], device=slots.device).expand_as(slots))
    stays = (order < size) | ~changeable_rows(topk_ids, row_kind, layer.num_experts)[..., None]
    kept = torch.where(stays, topk_weights, 0.0)
    scale = topk_weights.sum(dim=-1, keepdim=True) / kept.sum(dim=-1, keepdim=True)
    changed = ~stays.all(dim=-1, keepdim=True)
    return torch.where(stays, topk_ids, -1), torch.where(changed, kept * scale, topk_weights)


def oea(
    topk_ids: Tensor, topk_weights: Tensor, scores: Tensor | None, row_kind: Tensor, layer: Layer
) -> Choice:
    """Opportunistic expert activation (arXiv 2511.02237).

    U = the union of each row's best k0 = ``select_top_k``. A row walks its whole ranking and takes
    the experts that are in U until it has K; weights are its scores over those, renormalised.
    """
    kept = top_of_rows(topk_ids, topk_weights, row_kind, layer, layer.select_top_k)
    return refill(kept, topk_ids, topk_weights, need_scores(scores), row_kind)


def xshare(
    topk_ids: Tensor, topk_weights: Tensor, scores: Tensor | None, row_kind: Tensor, layer: Layer
) -> Choice:
    """XShare (arXiv 2602.07265).

    U = each row's first choice, then experts by the sum of their scores over re-routable rows,
    until U holds n = ``experts``. Each row selects its K anew inside U.

    With ``max_per_rank``, its variant for expert parallelism, an expert is passed over whose rank
    has so many of U already. First choices stay, even above the cap, and so do the experts of exact
    rows: without them a row could be left with nothing it asked for.
    """
    scores = need_scores(scores)
    rows = changeable_rows(topk_ids, row_kind, layer.num_experts)
    demand = torch.where(rows[..., None], scores, 0.0).sum(dim=-2)
    first = top_of_rows(topk_ids, topk_weights, row_kind, layer, 1)
    if layer.max_per_rank is not None:
        full = place_in_rank(by_demand(first, demand), layer.owner) >= layer.max_per_rank
        demand = demand.masked_fill(full, -1.0)
    kept = best_experts(first, demand, layer.experts) & (first | (demand >= 0))
    return refill(kept, topk_ids, topk_weights, scores, row_kind)


def lynx(
    topk_ids: Tensor, topk_weights: Tensor, scores: Tensor | None, row_kind: Tensor, layer: Layer
) -> Choice:
    """LYNX (arXiv 2411.08982, version 3).

    An expert's score is the sum, over the re-routable rows that chose it, of b^bin with
    bin = clamp(floor(alpha (logit_e - logit_top1)), -depth, 0). Every first choice is kept, and the
    best by score. A row's other slots go to its own best-scored kept experts, renormalised.

    The paper takes a cut from the distribution of scores and leaves alpha, b and the depth open:
    here n = ``experts`` is swept instead; ``alpha``, ``base`` and ``depth`` are settings. Logits
    are compared as logarithms of scores, the same for a softmax. On a bin's edge rounding decides.
    """
    scores = need_scores(scores)
    rows = changeable_rows(topk_ids, row_kind, layer.num_experts)
    chosen = torch.where(rows[..., None], topk_ids, 0).long()
    logits = scores.gather(-1, chosen).log()
    bins = (layer.alpha * (logits - logits.amax(dim=-1, keepdim=True))).floor()
    worth = torch.where(rows[..., None], layer.base ** bins.clamp(-layer.depth, 0), 0.0)
    of_experts = worth.new_zeros((*worth.shape[:-2], layer.num_experts))
    of_experts.scatter_add_(-1, chosen.flatten(-2), worth.flatten(-2))
    first = top_of_rows(topk_ids, topk_weights, row_kind, layer, 1)
    kept = best_experts(first, of_experts, layer.experts)
    return refill(kept, topk_ids, topk_weights, scores, row_kind)
