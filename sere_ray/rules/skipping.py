"""Rules that look at one row alone and leave some of its slots out: ``k1k2`` and ``ace``.

No row knows the batch, so experts are saved only where all rows leave them out.
"""

import torch
from torch import Tensor

from sere_ray.rules.common import changeable_rows, need_scores
from sere_ray.rules.interface import Choice, Layer


def k1k2(
    topk_ids: Tensor, topk_weights: Tensor, scores: Tensor | None, row_kind: Tensor, layer: Layer
) -> Choice:
    """k1 of k2 (arXiv 2609.04575, abstract and summaries).

    Each row keeps its k1 = ``select_top_k`` slots of largest weight; an expert's weight is its
    score over the sum of the k2 = ``normalise_over`` best scores of the row: renormalising over
    the few that run would make the whole branch too loud. With k1 >= K nothing changes.

    The paper has gates that renormalise over K, where a row's weights sum to 1. Here the quotient
    is multiplied by the row's former sum W, so that k2 = K gives kept slots the weights they had.
    """
    scores = need_scores(scores)
    size = layer.select_top_k
    if not 0 < size < topk_ids.shape[-1]:
        return topk_ids.clone(), topk_weights.clone()
    rows = changeable_rows(topk_ids, row_kind, layer.num_experts)[..., None]
    order = topk_weights.argsort(dim=-1, descending=True, stable=True)
    best = torch.zeros_like(rows.expand(topk_ids.shape)).scatter(-1, order[..., :size], True)
    chosen = torch.where(rows, topk_ids, 0).long()
    over = min(layer.normalise_over, layer.num_experts)
    mass = scores.topk(over, dim=-1).values.sum(dim=-1, keepdim=True)
    weights = scores.gather(-1, chosen) / mass * topk_weights.sum(dim=-1, keepdim=True)
    return _keep(topk_ids, topk_weights, rows, best, weights.to(topk_weights.dtype))


def ace(
    topk_ids: Tensor, topk_weights: Tensor, scores: Tensor | None, row_kind: Tensor, layer: Layer
) -> Choice:
    """ACE (arXiv 2609.05228; formulas of its code, github.com/xzktx003/moe-prune).

    Two views of how much an expert e can do, both of the weights alone
    (:mod:`sere_ray.evaluation.weight_statistics`): gsp(e) and rcr(e). A slot's share in a view is
    its weight times the view, over the row's sum of that. A slot is left out if both
    share_gsp < ``tau`` and ``rcr_scale`` x share_rcr < ``tau``; a row's first choice never is. Kept
    weights are rescaled to the row's former sum.

    The abstract has both views alike; the newest code counts the second one a tenth, which is the
    default here. Left open: tau by layer, which the code finds as a quantile over a text.
    """
    del scores
    rows = changeable_rows(topk_ids, row_kind, layer.num_experts)[..., None]
    chosen = torch.where(rows, topk_ids, 0).long()
    weights = topk_weights.float()
    views = [weights * layer.statistic(name)[chosen] for name in ("ace_gsp", "ace_rcr")]
    gsp, rcr = (view / (view.sum(dim=-1, keepdim=True) + 1e-8) for view in views)
    best = torch.maximum(gsp, layer.rcr_scale * rcr) >= layer.tau
    best = best.scatter(-1, weights.argmax(dim=-1, keepdim=True), True)
    kept = torch.where(best, weights, 0.0)
    scale = weights.sum(dim=-1, keepdim=True) / kept.sum(dim=-1, keepdim=True)
    changed = ~best.all(dim=-1, keepdim=True)
    new_weights = torch.where(changed, (kept * scale).to(topk_weights.dtype), topk_weights)
    return _keep(topk_ids, topk_weights, rows, best, new_weights)


def _keep(ids: Tensor, weights: Tensor, rows: Tensor, best: Tensor, new: Tensor) -> Choice:
    """Of re-routable rows the best slots with new weights; the others dropped."""
    return (
        torch.where(rows & ~best, -1, ids),
        torch.where(rows, torch.where(best, new, 0.0), weights),
    )
