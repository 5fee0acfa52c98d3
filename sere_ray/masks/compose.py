"""Masks first, then a rule over what they leave.

To the rule a row is as if the gate had chosen only the experts that its mask leaves, and scored
those that it masks 0: a masked slot names nobody, demands nothing, does not count for the floor,
and under `margin` is neither a runner-up nor a stand-in of its row. Rules take K slots of every
row, so rows are handed to them by the number of slots that are left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sere_ray.masks.slots import drop
from sere_ray.rules import PADDING, RULES, Choice, Layer
from sere_ray.rules.demand import DEMAND_RULES, DemandRule
from sere_ray.rules.registry import RULES_AFTER_MASKS
from sere_ray.util.errors import UnsupportedError


def after_masks(
    rule: str,
    kept: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor | None,
    row_kind: Tensor,
    layer: Layer,
) -> Choice:
    """What a rule makes of the slots that are left.

    Args:
        rule: one of :data:`~sere_ray.rules.registry.RULES_AFTER_MASKS`.
        kept: ``[..., T, K]`` bool, of :func:`~sere_ray.masks.slots.kept_slots`.
        topk_ids: ``[..., T, K]``, the gate's.
        topk_weights: ``[..., T, K]``.
        scores: ``[..., T, E]`` float32, or None where the rule needs none.
        row_kind: ``[..., T]`` int8.
        layer: what the rule knows of the layer.

    Returns:
        New ids and weights; a dropped slot is id -1, weight 0.

    Raises:
        UnsupportedError: another rule.
    """
    if rule == "none":
        return drop(kept, topk_ids, topk_weights)
    if rule == "sere":
        return _sere(kept, topk_ids, topk_weights, row_kind, layer)
    if rule not in DEMAND_RULES:
        raise UnsupportedError(
            f"rule {rule!r}: masks go with {', '.join(RULES_AFTER_MASKS)} only; leave masks out"
        )
    if scores is None:
        raise ValueError(f"the rule {rule!r} needs the gate's scores [..., T, E], got None")
    of_demand = DEMAND_RULES[rule]
    layer = of_demand.settle(layer)
    rows = MaskedRows.of(kept, topk_ids, topk_weights, scores, row_kind)
    return rows.take(of_demand, of_demand.keep(rows.ask(of_demand, layer), layer), layer)


@dataclass(frozen=True)
class MaskedRows:
    """Rows whose slots that are left come first, for a rule in halves."""

    count: Tensor
    """``[..., T]`` int64, slots that are left."""
    order: Tensor
    """``[..., T, K]`` int64, where each slot came from."""
    ids: Tensor
    """``[..., T, K]``, those left first, in slot order."""
    weights: Tensor
    """``[..., T, K]``."""
    scores: Tensor
    """``[..., T, E]``, 0 where the row masked the expert."""
    row_kind: Tensor
    """``[..., T]`` int8."""

    @classmethod
    def of(
        cls, kept: Tensor, ids: Tensor, weights: Tensor, scores: Tensor, row_kind: Tensor
    ) -> "MaskedRows":
        """Arguments as of :func:`after_masks`."""
        order = kept.logical_not().to(torch.int8).argsort(dim=-1, stable=True)
        masked = torch.zeros_like(scores, dtype=torch.bool)
        valid = ids.clamp(0, scores.shape[-1] - 1).long()
        masked.scatter_(-1, valid, ~kept)
        return cls(
            count=kept.sum(dim=-1),
            order=order,
            ids=ids.gather(-1, order),
            weights=weights.gather(-1, order),
            scores=scores.masked_fill(masked, 0.0),
            row_kind=row_kind.expand(kept.shape[:-1]),
        )

    def ask(self, rule: DemandRule, layer: Layer, row_weight: Tensor | None = None) -> Tensor:
        """``[..., E]`` int64: what the rows want of each expert; sums add up over ranks.

        Args:
            rule: what asks.
            layer: settled by the rule.
            row_weight: ``[..., T]`` int64, how far drafts count; None = all are whole.
        """
        shape = (*self.scores.shape[:-2], self.scores.shape[-1])
        asked = self.scores.new_zeros(shape, dtype=torch.int64)
        for size in self._sizes():
            ids, weights, kinds = self._of_size(size)
            asked = asked + rule.ask(ids, weights, self.scores, kinds, layer, row_weight)
        return asked

    def take(self, rule: DemandRule, kept: Tensor, layer: Layer) -> Choice:
        """What the rows take of the kept experts, ``[..., E]`` bool; slots where they were."""
        all_ids, all_weights = torch.full_like(self.ids, -1), torch.zeros_like(self.weights)
        for size in self._sizes():
            ids, weights, kinds = self._of_size(size)
            new_ids, new_weights = rule.take(kept, ids, weights, self.scores, kinds, layer)
            new_ids = torch.where((new_weights == 0) & (new_ids != ids), -1, new_ids)
            of_size = (self.count == size)[..., None]
            all_ids[..., :size] = torch.where(of_size, new_ids, all_ids[..., :size])
            all_weights[..., :size] = torch.where(of_size, new_weights, all_weights[..., :size])
        return (
            torch.empty_like(all_ids).scatter_(-1, self.order, all_ids),
            torch.empty_like(all_weights).scatter_(-1, self.order, all_weights),
        )

    def _sizes(self) -> list[int]:
        """Numbers of slots that some row has left; a row with none asks and takes nothing."""
        return sorted(set(self.count.flatten().tolist()) - {0})

    def _of_size(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and weights ``[..., T, size]`` and kinds ``[..., T]``: other rows are padding."""
        kinds = torch.where(self.count == size, self.row_kind, PADDING).to(self.row_kind.dtype)
        return self.ids[..., :size], self.weights[..., :size], kinds


def rows_for_sere(
    kept: Tensor, ids: Tensor, weights: Tensor, row_kind: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, weights and kinds with which the rule ``sere`` sees only what is left.

    A masked slot names the row's best expert once more, with weight 0, so it asks for nothing new:
    slot orders are of an expert's best slot. A row with nothing left is padding.
    """
    best = weights.masked_fill(~kept, -1.0).argmax(dim=-1, keepdim=True)
    named = torch.where(kept, ids, ids.gather(-1, best))
    kinds = torch.where(kept.any(dim=-1), row_kind, PADDING).to(torch.int8)
    return named, torch.where(kept, weights, 0.0), kinds


def _sere(kept: Tensor, ids: Tensor, weights: Tensor, row_kind: Tensor, layer: Layer) -> Choice:
    named, left, kinds = rows_for_sere(kept, ids, weights, row_kind)
    return drop(kept, *RULES["sere"].apply(named, left, None, kinds, layer))
