"""MoNE (arXiv 2507.00390, ICLR 2026): the same experts of a layer are constants in every step.

Formulas: third-party summaries of the paper, and its published code (github.com/zxgx/mode-pd,
``expert_prune_by_mone`` with the metric ``fusion``).
"""

import torch
from torch import Tensor

from sere_ray.rules.common import changeable_rows
from sere_ray.rules.interface import Choice, Layer


def mone(
    topk_ids: Tensor, topk_weights: Tensor, scores: Tensor | None, row_kind: Tensor, layer: Layer
) -> Choice:
    """Slots of all but the n = ``experts`` best experts of the layer are dropped.

    Best by phi(e) = ||sqrt(variance of e's output over tokens that chose it)||_2 times e's summed
    weight over all tokens; ties go to the lowest index. Weights stay; :func:`novices` gives what a
    dropped expert is replaced by. A row may keep no expert at all.

    A summary of the paper divides the summed weight by the tokens that chose e, its code by all:
    the code is followed, since the paper calls it access frequency. Both rank over a layer or over
    the model; here over each layer, as the last scripts of the code do. Decode rows alone change
    here; MoNE prunes a checkpoint, and so prompts, too.
    """
    del scores
    rows = changeable_rows(topk_ids, row_kind, layer.num_experts)[..., None]
    order = layer.statistic("novice_score").argsort(descending=True, stable=True)
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept[order[: layer.experts]] = True
    dropped = rows & ~kept[torch.where(rows, topk_ids, 0).long()]
    return torch.where(dropped, -1, topk_ids), torch.where(dropped, 0.0, topk_weights)


def novices(before: Choice, after: Choice, layer: Layer) -> Tensor:
    """``[..., T, H]``: the sum over dropped slots of weight times the expert's mean output.

    The mean is over calibration tokens that chose the expert.
    """
    ids, weights = before
    dropped = (after[0] < 0) & (ids >= 0) & (ids < layer.num_experts)
    of_experts = weights.new_zeros((*ids.shape[:-1], layer.num_experts), dtype=torch.float32)
    weights = torch.where(dropped, weights.float(), 0.0)
    of_experts.scatter_add_(-1, torch.where(dropped, ids, 0).long(), weights)
    return of_experts @ layer.statistic("output_mean")
