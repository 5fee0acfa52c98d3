"""Learned masks on a CPU engine, then the rule over what they leave, in one layer of a step.

The specification is :func:`sere_ray.masks.compose.after_masks`, which measurements on held-out text
run. Here the rule comes in its halves, ranks' exchange between them. In the same exchange ranks
say what their gates chose, which rows without their masked slots do not tell: it is counted.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sere_ray.engine.cpu.rules import COMPILED, LayerOfStep, targets
from sere_ray.engine.cpu.union import UnionOfRanks
from sere_ray.kernel.cpu_margin import busiest, finish
from sere_ray.kernel.cpu_sere import (
    StepCounts,
    lowest_slot_orders,
    merge_repeated,
    reroute_by_slot_orders,
)
from sere_ray.masks.compose import MaskedRows, rows_for_sere
from sere_ray.masks.slots import LayerMask, drop, kept_slots
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import PADDING, Choice
from sere_ray.rules.common import named_by


class _Ruled(NamedTuple):
    """What the rule made of what masks left; experts are those of all ranks of the union."""

    choice: Choice
    """A dropped slot is id -1, weight 0."""
    before: Tensor
    """``[E]`` bool: experts that gates chose."""
    reads: int
    """Experts that are read."""
    reads_max_rank: int
    """The same of the rank that reads most."""
    rerouted: int | None = None
    """Slots of these rows that the rule changed; None = those that :func:`finish` counts."""
    critical_kept: int = 0


def apply_after_masks(
    bound: BoundPolicy,
    of_step: LayerOfStep,
    hidden: Tensor | None,
    mask: LayerMask | None,
    union: UnionOfRanks | None,
) -> tuple[Choice, StepCounts]:
    """New ids and weights of a layer, and what changed.

    Args:
        bound: the policy's numbers for this step.
        of_step: the layer.
        hidden: ``[T, H]``, what goes to the experts; None where nothing is masked.
        mask: of the layer; None = nothing is masked.
        union: the ranks whose rows the kept experts are chosen over; None = these rows alone.

    Returns:
        ``[T, K]`` ids and weights, both new tensors. Where the experts' code leaves out ids of -1,
        dropped slots have them; else they name an expert that is read anyway, with weight 0.
    """
    ids, weights, kinds = of_step.topk_ids, of_step.topk_weights, of_step.row_kind
    kept = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None:
        assert hidden is not None
        kept = kept_slots(hidden, ids, weights, kinds, mask)
    if bound.rule == "none":
        found = _none(of_step, kept, union)
    elif bound.rule == "sere":
        found = _sere(bound, of_step, kept, union)
    else:
        found = _by_demand(bound, of_step, kept, union)
    (new_ids, new_weights), skips = found.choice, of_step.skips_dropped
    masked = int((~kept).sum())
    dropped = int((kept & (new_ids < 0) & (ids >= 0)).sum())
    changed, _ = finish(ids, new_ids, kinds, names_dropped=not skips)
    if not skips:
        _name_empty_rows(new_ids, ids)
    counts = StepCounts(
        experts_before=int(found.before.sum()),
        experts_after=found.reads if skips else max(found.reads, 1),
        slots_rerouted=changed - masked if found.rerouted is None else found.rerouted,
        critical_kept=found.critical_kept,
        slots_merged=dropped if skips else 0,
        beyond_range=0,  # `loss`, which has a range, does not go with masks
        experts_max_rank_before=busiest(found.before, of_step.owner),
        experts_max_rank_after=found.reads_max_rank if skips else max(found.reads_max_rank, 1),
        slots_masked=masked,
    )
    return (new_ids, new_weights), counts


def _none(of_step: LayerOfStep, kept: Tensor, union: UnionOfRanks | None) -> _Ruled:
    """Ranks have nothing to agree on; they tell each other what they read, since it is counted."""
    choice = drop(kept, of_step.topk_ids, of_step.topk_weights)
    named = torch.stack([_named(of_step, ids) for ids in (of_step.topk_ids, choice[0])]).long()
    if union is not None:
        union.add_up(named)
    before, after = named > 0
    return _Ruled(choice, before, int(after.sum()), busiest(after, of_step.owner), rerouted=0)


def _sere(
    bound: BoundPolicy, of_step: LayerOfStep, kept: Tensor, union: UnionOfRanks | None
) -> _Ruled:
    similarity, numbers = of_step.matrix(), of_step.numbers(bound)
    num_experts, num_slots = len(similarity), kept.shape[1]
    ids, weights, kinds = rows_for_sere(
        kept, of_step.topk_ids, of_step.topk_weights, of_step.row_kind
    )
    unnamed = (~_named(of_step, of_step.topk_ids)).to(torch.uint8)
    both = torch.cat((lowest_slot_orders(ids, weights, kinds, num_experts), unnamed))
    if union is not None:
        union.take_minimum(both)
    orders, unnamed = both[:num_experts], both[num_experts:]
    if union is not None and union.compares:
        union.compare(of_step.layer, targets(orders, similarity, num_slots, numbers))
    new_ids, counts = reroute_by_slot_orders(ids, orders, similarity, kinds, **numbers)
    if 0 < bound.select_top_k < num_slots:
        new_ids, weights, _ = merge_repeated(new_ids, weights, kinds, num_experts)
    return _Ruled(
        drop(kept, new_ids, weights),
        unnamed == 0,
        counts.experts_after,
        counts.experts_max_rank_after,
        counts.slots_rerouted,
        counts.critical_kept,
    )


def _by_demand(
    bound: BoundPolicy, of_step: LayerOfStep, kept: Tensor, union: UnionOfRanks | None
) -> _Ruled:
    rule = COMPILED[bound.rule]
    knobs = of_step.knobs(rule, bound)
    rows = MaskedRows.of(
        kept, of_step.topk_ids, of_step.topk_weights, of_step.scores(), of_step.row_kind
    )
    asked = rows.ask(rule, knobs, of_step.padded_row_weight)
    both = torch.cat((asked, _named(of_step, of_step.topk_ids).long()))
    if union is not None:
        union.add_up(both)
    asked, before = both[: len(asked)], both[len(asked) :]
    reads = rule.keep(asked, knobs)
    if union is not None and union.compares:
        union.compare(of_step.layer, reads)
    choice = rows.take(rule, reads, knobs)
    return _Ruled(choice, before > 0, int(reads.sum()), busiest(reads, of_step.owner))


def _named(of_step: LayerOfStep, ids: Tensor) -> Tensor:
    """``[E]`` bool: experts among the ids ``[T, K]`` of rows that are no padding."""
    return named_by(ids, of_step.row_kind != PADDING, of_step.router_logits.shape[1])


def _name_empty_rows(new_ids: Tensor, ids: Tensor) -> None:
    """Give rows without experts one, in place: one that is read anyway; expert 0 if none is."""
    empty = (new_ids < 0) & (ids >= 0)
    if empty.any():
        read = new_ids[new_ids >= 0]
        new_ids[empty] = read[0] if len(read) else 0
