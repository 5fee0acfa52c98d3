"""The rules of a CPU engine in one layer: kept experts from the rows of all ranks, then new ids."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sere_ray.engine.cpu.union import UnionOfRanks
from sere_ray.kernel import cpu_margin
from sere_ray.kernel.cpu_margin import busiest, finish
from sere_ray.kernel.cpu_sere import (
    StepCounts,
    lowest_slot_orders,
    merge_repeated,
    reroute_and_count,
    reroute_by_slot_orders,
)
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import REROUTABLE, Choice, Layer
from sere_ray.rules.demand import DEMAND_RULES, DemandRule
from sere_ray.rules.gate import Gate, scores_of


class LayerOfStep(NamedTuple):
    """What a rule is told of one layer of the running step."""

    layer: int
    """Decoder layer index."""
    position: int
    """Of the layer among the MoE layers, from 0."""
    topk_ids: Tensor
    """``[T, K]``, the gate's."""
    topk_weights: Tensor
    """``[T, K]``."""
    router_logits: Tensor
    """``[T, E]``."""
    gate: Gate
    """What makes scores of them, and ranks by."""
    row_kind: Tensor
    """``[T]`` int8."""
    similarity: Tensor | None
    """``[E, E]`` float32; None where the policy names no artifact."""
    statistics: Mapping[str, Tensor]
    """Further tensors of the layer by name."""
    owner: Tensor | None
    """``[E]`` int64, rank of every expert; None = one rank holds them all."""
    skips_dropped: bool
    """Whether the experts' code leaves out ids of -1: then a row names an expert once."""
    row_weight: Tensor | None = None
    """``[rows]`` int64 of the step, without padding: how far drafts count; None = all are whole."""

    @property
    def padded_row_weight(self) -> Tensor | None:
        """``[T]``, 0 for padding."""
        if self.row_weight is None:
            return None
        return F.pad(self.row_weight, (0, len(self.topk_ids) - len(self.row_weight)))

    def scores(self) -> Tensor:
        """``[T, E]`` float32: what the gate makes of the logits."""
        return scores_of(self.router_logits, self.gate)

    def knobs(self, rule: DemandRule, bound: BoundPolicy) -> Layer:
        """What a rule of demand is called with in this layer."""
        layer = bound.of_layer(
            self.position,
            self.router_logits.shape[1],
            self.similarity,
            self.owner,
            self.statistics,
        )
        return rule.settle(replace(layer, gate=self.gate))

    def numbers(self, bound: BoundPolicy) -> dict[str, Any]:
        """What the loops of ``sere`` are called with."""
        return {
            "select_top_k": bound.select_top_k,
            "threshold": bound.threshold,
            "min_primary_experts": bound.min_primary_experts,
            "owner": self.owner,
        }

    def matrix(self) -> Tensor:
        """The similarity, for a rule that reads it: then a policy names an artifact."""
        assert self.similarity is not None
        return self.similarity


COMPILED = {
    **DEMAND_RULES,
    "margin": DEMAND_RULES["margin"]._replace(
        ask=cpu_margin.ask,
        keep=cpu_margin.keep,
        take=cpu_margin.refill_rows,
        given_up=cpu_margin.demand_given_up,
    ),
}
"""The rules of demand, ``margin`` as compiled loops."""


def apply_rule(
    bound: BoundPolicy, of_step: LayerOfStep, union: UnionOfRanks | None
) -> tuple[Choice, StepCounts]:
    """New ids and weights of a layer, and what changed.

    Args:
        bound: the policy's numbers for this step.
        of_step: the layer.
        union: the ranks whose rows the kept experts are chosen over; None = these rows alone.

    Returns:
        ``[T, K]`` ids and weights, both new tensors. Of the counts experts are those of all ranks
        of the union, slots those of these rows.
    """
    if bound.rule == "sere":
        return _apply_sere(bound, of_step, union)
    return _apply_by_demand(COMPILED[bound.rule], bound, of_step, union)


def _apply_sere(
    bound: BoundPolicy, of_step: LayerOfStep, union: UnionOfRanks | None
) -> tuple[Choice, StepCounts]:
    ids, weights, kinds = of_step.topk_ids, of_step.topk_weights, of_step.row_kind
    similarity, numbers = of_step.matrix(), of_step.numbers(bound)
    if union is None:
        new_ids, counts = reroute_and_count(ids, weights, similarity, kinds, **numbers)
    else:
        orders = lowest_slot_orders(ids, weights, kinds, len(similarity))
        union.take_minimum(orders)
        if union.compares:
            union.compare(of_step.layer, targets(orders, similarity, ids.shape[1], numbers))
        new_ids, counts = reroute_by_slot_orders(ids, orders, similarity, kinds, **numbers)
    if not (of_step.skips_dropped and 0 < bound.select_top_k < ids.shape[1]):
        return (new_ids, weights.clone()), counts
    new_ids, new_weights, merged = merge_repeated(new_ids, weights, kinds, len(similarity))
    return (new_ids, new_weights), counts._replace(slots_merged=merged)


def targets(orders: Tensor, similarity: Tensor, top_k: int, numbers: dict[str, Any]) -> Tensor:
    """Where slots of each expert go: new ids of rows that name every expert once.

    Args:
        orders: ``[E]`` uint8, the lowest slot order in which a row names each expert.
        similarity: ``[E, E]`` float32.
        top_k: K.
        numbers: as the rule takes them.
    """
    count = len(orders)
    rows = -(-count // top_k)
    slots = torch.full((rows * top_k,), -1, dtype=torch.int32, device="cpu")
    slots[:count] = torch.arange(count, dtype=torch.int32, device="cpu")
    kinds = torch.full((rows,), REROUTABLE, dtype=torch.int8, device="cpu")
    targets, _ = reroute_by_slot_orders(
        slots.view(rows, top_k), orders, similarity, kinds, **numbers
    )
    return targets


def _apply_by_demand(
    rule: DemandRule, bound: BoundPolicy, of_step: LayerOfStep, union: UnionOfRanks | None
) -> tuple[Choice, StepCounts]:
    """The rule in its two halves, ranks' sums between them.

    Where the experts' code takes no id of -1, a dropped slot names the row's best expert, with
    weight 0.
    """
    ids, weights, kinds = of_step.topk_ids, of_step.topk_weights, of_step.row_kind
    scores, knobs, owner = of_step.scores(), of_step.knobs(rule, bound), of_step.owner
    asked = rule.ask(ids, weights, scores, kinds, knobs, of_step.padded_row_weight)
    if union is not None:
        union.add_up(asked)
    kept = rule.keep(asked, knobs)
    if union is not None and union.compares:
        union.compare(of_step.layer, kept)
    new_ids, new_weights = rule.take(kept, ids, weights, scores, kinds, knobs)
    named = rule.is_named(asked)
    rerouted, dropped = finish(ids, new_ids, kinds, names_dropped=not of_step.skips_dropped)
    counts = StepCounts(
        experts_before=int(named.sum()),
        experts_after=int(kept.sum()),
        slots_rerouted=rerouted,
        critical_kept=0,
        slots_merged=dropped if of_step.skips_dropped else 0,
        beyond_range=int(_is_beyond(rule, asked, knobs)),
        experts_max_rank_before=busiest(named, owner),
        experts_max_rank_after=busiest(kept, owner),
    )
    return (new_ids, new_weights), counts


def _is_beyond(rule: DemandRule, asked: Tensor, knobs: Layer) -> bool:
    """Whether more demand is given up than in any step of calibration."""
    return knobs.most is not None and bool(rule.given_up(asked, knobs) > knobs.most)
