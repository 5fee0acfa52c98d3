"""What a mask says of a row's slots: the specification.

Beside the gate of a layer there is a mask router W ``[E, H]`` on the same input x. A slot of expert
e is kept if sigmoid(W_e x) >= 1/2, which is W_e x >= 0. Where W is zero everything is kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from sere_ray.rules import Choice
from sere_ray.rules.common import changeable_rows


@dataclass(frozen=True)
class LayerMask:
    """The mask router of a layer at one level."""

    weight: Tensor
    """``[E, H]`` float32."""
    keep_first: bool
    """Whether a row keeps its first choice whatever the router says."""


def mask_logits(hidden: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """``[..., T, K]`` float32: W_e x of each slot.

    Args:
        hidden: ``[..., T, H]``, what the gate sees.
        ids: ``[..., T, K]``; a sentinel is given the number of expert 0.
        weight: ``[E, H]`` float32.
    """
    valid = torch.where((ids >= 0) & (ids < len(weight)), ids, 0).long()
    return linear(hidden.to(weight.dtype), weight).gather(-1, valid)


def first_choices(weights: Tensor) -> Tensor:
    """``[..., T, K]`` bool: the slot of largest weight of each row, of equal ones the first."""
    best = weights.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, best, True)


def kept_slots(
    hidden: Tensor, ids: Tensor, weights: Tensor, row_kind: Tensor, mask: LayerMask
) -> Tensor:
    """``[..., T, K]`` bool: slots that the mask leaves. Rows that no rule may change keep all.

    Args:
        hidden: ``[..., T, H]``, what the gate sees.
        ids: ``[..., T, K]``, the gate's.
        weights: ``[..., T, K]``.
        row_kind: ``[..., T]`` int8.
        mask: of the layer.
    """
    of_slots = mask_logits(hidden, ids, mask.weight)
    return kept_by(
        of_slots, ids, weights, row_kind, num_experts=len(mask.weight), keep_first=mask.keep_first
    )


def kept_by(
    of_slots: Tensor,
    ids: Tensor,
    weights: Tensor,
    row_kind: Tensor,
    *,
    num_experts: int,
    keep_first: bool,
) -> Tensor:
    """The same, of :func:`mask_logits`, ``[..., T, K]``, however they were computed."""
    kept = of_slots >= 0
    if keep_first:
        kept = kept | first_choices(weights)
    return kept | ~changeable_rows(ids, row_kind, num_experts)[..., None]


def drop(kept: Tensor, ids: Tensor, weights: Tensor) -> Choice:
    """The choice without the slots that are not kept: id -1, weight 0."""
    return torch.where(kept, ids, -1), torch.where(kept, weights, 0.0)
