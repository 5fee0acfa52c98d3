"""What the rule ``sere`` did to a layer: the reference of the counters that engines keep."""

from typing import NamedTuple

import torch
from torch import Tensor

from sere_ray.rules.interface import PADDING
from sere_ray.rules.sere import Rerouting


class RuleCounts(NamedTuple):
    """What the rule did in one layer of one step; 0-d int64 tensors, no host synchronisation."""

    experts_before: Tensor
    """Distinct experts that non-padding rows name before the rule."""
    experts_after: Tensor
    """The same after the rule: what the layer reads from memory."""
    slots_rerouted: Tensor
    """Slots of non-padding rows whose expert changed."""
    critical_kept: Tensor
    """Experts read outside P: no stand-in was similar enough."""


def count(
    rerouting: Rerouting, topk_ids: Tensor, new_ids: Tensor, row_kind: Tensor | None
) -> RuleCounts:
    """Counters of the specification, of one step.

    Args:
        rerouting: what turned ``topk_ids`` into ``new_ids``.
        topk_ids: ``[T, K]`` before the rule.
        new_ids: ``[T, K]`` after it.
        row_kind: ``[T]`` int8 or None.
    """
    named, primary, target = rerouting
    nowhere = torch.zeros(len(named) + 1, dtype=torch.bool, device=new_ids.device)
    read = nowhere.scatter_(0, torch.where(named, target, len(named)), True)
    before, after, of_primary = torch.stack((named, read[:-1], primary)).sum(dim=1).unbind()
    changed = new_ids != topk_ids
    if row_kind is not None:
        changed = changed & (row_kind != PADDING)[:, None]
    return RuleCounts(before, after, changed.sum(), after - of_primary)
