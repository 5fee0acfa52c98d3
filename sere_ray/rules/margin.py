"""The rule ``margin``: an expert is read if the batch would miss it, not if a row names it.

A gate's K-th choice and its (K+1)-th are often as good as each other. What a row loses with a
chosen expert is therefore measured by its lead over the runners-up, not by its weight. The demand
for an expert is the sum of the squared leads over the rows that chose it; experts with more demand
than tau are kept, and every row's first choice. A slot whose expert is not kept goes to the row's
own best-scored kept expert, with less weight than its score says: the gate did not choose it.

Demand is a sum of integers, so that it is the same in whatever order rows and ranks are added up.
"""

import torch
from torch import Tensor

from sere_ray.rules.interface import (
    Choice,
    Layer,
    changeable_rows,
    named_by,
    need_scores,
    refill,
)
from sere_ray.rules.peers import best_experts, top_of_rows

UNIT = 2**20
"""Demand of a lead of 1: integers are in units of 2^-20."""


def margin(
    topk_ids: Tensor, topk_weights: Tensor, scores: Tensor | None, row_kind: Tensor, layer: Layer
) -> Choice:
    """Keep what the batch demands more than ``tau``, and at least ``min_primary_experts``.

    With m = K a batch of one row is exact. Weights: :func:`sere_ray.rules.interface.refill`.
    """
    scores = need_scores(scores)
    rows = changeable_rows(topk_ids, row_kind, layer.num_experts)
    demanded = demand(topk_ids, scores, row_kind, layer)
    first = top_of_rows(topk_ids, topk_weights, row_kind, layer, 1)
    kept = first | (demanded > round(layer.tau * UNIT))
    # The floor is filled by demand with experts that somebody named.
    named = first | named_by(topk_ids, rows, layer.num_experts)
    enough = best_experts(kept, demanded.masked_fill(~named, -1), layer.min_primary_experts)
    return refill(
        enough & named, topk_ids, topk_weights, scores, row_kind, beta=layer.beta, fill=layer.fill
    )


def demand(topk_ids: Tensor, scores: Tensor, row_kind: Tensor, layer: Layer) -> Tensor:
    """``[..., E]`` int64: sum over re-routable rows of lead squared, in units of 2^-20.

    A row's lead for a chosen expert is its score less the mean score of the ``runners_up`` best
    unchosen experts, at least 0, divided by the sum of the chosen scores.
    """
    rows = changeable_rows(topk_ids, row_kind, layer.num_experts)
    chosen = torch.where(rows[..., None], topk_ids, 0).long()
    of_chosen = scores.gather(-1, chosen)
    count = min(layer.runners_up, layer.num_experts - topk_ids.shape[-1])
    reference = torch.zeros_like(of_chosen[..., :1])
    if count:
        others = scores.scatter(-1, chosen, 0.0)
        reference = others.topk(count, dim=-1).values.mean(dim=-1, keepdim=True)
    lead = (of_chosen - reference).clamp(min=0) / of_chosen.sum(dim=-1, keepdim=True)
    units = torch.where(rows[..., None], (lead.square() * UNIT).round(), 0.0).long()
    total = units.new_zeros((*units.shape[:-2], layer.num_experts))
    return total.scatter_add_(-1, chosen.flatten(-2), units.flatten(-2))
