"""ExFold (arXiv 2608.24938) as decode steps run it: a batch budget, and scaled stand-ins.

Formulas: the paper by third-party summaries, and its published code
(github.com/Time-Rune/ExFold-MoE, ``exfold/qwen3``: calibration and decode kernels).

The published code has no row kinds: that exact rows keep their experts, first in the budget, is
ours. Its folding of prompt slots, the damped scalars of its DeepSeek-V4 variant, whose text does
not say how the rest is spread, and the static pool of its speed figure are left out.
"""

import torch
from torch import Tensor

from sere_ray.rules.common import best_experts, changeable_rows, named_by, read_anyway
from sere_ray.rules.interface import Choice, Layer
from sere_ray.rules.merging import merge_repeated

UNSEEN = 1e30
"""Loss of a pair of experts that calibration never saw chosen together; its scale is 0."""


def exfold(
    topk_ids: Tensor, topk_weights: Tensor, scores: Tensor | None, row_kind: Tensor, layer: Layer
) -> Choice:
    """Keep the n = ``experts`` that weigh most in the batch; scale what stands in for the others.

    An expert's importance is the sum, over the rows that chose it, of weight times the expert's
    mean output norm h; first choices are not protected. A slot of an expert u that is not kept
    goes to the kept v of least loss(u, v), and its weight is multiplied by s(u, v), which may be
    negative. Ties go to the lowest index. Where no kept v was ever seen beside u the slot is
    dropped. Slots of a row that end on one expert are merged, which changes no sum.

    Reads ``output_norm [E]``, ``stand_in_scale [E, E]`` and ``stand_in_loss [E, E]``: see
    :mod:`sere_ray.calibration.routed`.
    """
    del scores
    rows = changeable_rows(topk_ids, row_kind, layer.num_experts)[..., None]
    chosen = torch.where(rows, topk_ids, 0).long()
    weights = topk_weights.float()
    worth = torch.where(rows, weights * layer.statistic("output_norm")[chosen], 0.0)
    importance = worth.new_zeros((*worth.shape[:-2], layer.num_experts))
    importance.scatter_add_(-1, chosen.flatten(-2), worth.flatten(-2))
    anyway = read_anyway(topk_ids, row_kind, layer.num_experts)
    named = anyway | named_by(topk_ids, rows[..., 0], layer.num_experts)
    kept = named & best_experts(anyway, importance.masked_fill(~named, -1.0), layer.experts)

    of_slots = kept[..., None, None, :]
    loss = layer.statistic("stand_in_loss")[chosen].masked_fill(~of_slots, torch.inf)
    stand_in = loss.argmin(dim=-1)  # the first of equal ones
    least = loss.gather(-1, stand_in[..., None])[..., 0]
    scale = layer.statistic("stand_in_scale")[chosen, stand_in]
    scale = torch.where(least < UNSEEN, scale, 0.0)
    served = of_slots.expand(loss.shape).gather(-1, chosen[..., None])[..., 0]
    moved = rows & ~served
    new_ids = torch.where(moved, torch.where(scale != 0, stand_in, -1).to(topk_ids.dtype), topk_ids)
    new_weights = torch.where(moved, (weights * scale).to(topk_weights.dtype), topk_weights)
    return merge_repeated(new_ids, new_weights, row_kind=row_kind, num_experts=layer.num_experts)
