"""The rule ``spare``: an expert is not read if the batch can do without it.

``margin`` keeps an expert whenever demand for it is above tau. But where another kept expert makes
nearly the same of the tokens that choose it, little is lost without it. How much of an expert's
output the best multiple of another one leaves over, on the tokens that chose it, is what
calibration measures for every pair (``directed_loss`` and ``directed_scale``):

- An expert is dropped if its demand times what a more demanded kept expert leaves over is at most
  tau. Without any stand-in everything is left over: then this is ``margin``'s threshold.
- A slot whose expert is dropped goes to the kept expert that leaves the least over, with its weight
  times the scale that fits best. Where that leaves more than ``limit`` the slot is dropped, and the
  row's other weights stay.

Demand is ``margin``'s, a sum of squares over rows; ``lead`` says of what: 1 = the lead over the
runners-up, 0 = the share of the row's weight, or a mixture.

Experts that were cut out of a dense layer have good stand-ins; those that were trained from scratch
have none, and a bad one does more harm than none. Which kind a layer is of the statistics tell:
:func:`modes_of`.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sere_ray.rules.common import (
    best_experts,
    changeable_rows,
    given_up,
    held,
    named_by,
    need_scores,
    read_anyway,
    top_of_rows,
)
from sere_ray.rules.interface import Choice, Layer
from sere_ray.rules.margin import UNIT, demand, demand_units
from sere_ray.rules.merging import merge_repeated

LOSS_UNIT = 256
"""Losses are integers in 1/256, from 0 to 1."""
STANDS_IN = 0.5
"""A layer has stand-ins if half of its experts have one that leaves less than this over."""
_NAMED, _ANYWAY, _DEMAND = 1, 2**14, 2**28
"""What a rank adds to an expert's number in :func:`ask`: for naming it, for keeping it in any case,
and per unit of demand."""


def spare(
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor | None,
    row_kind: Tensor,
    layer: Layer,
    row_weight: Tensor | None = None,
) -> Choice:
    """Keep what cannot be done without; the best kept stand-in, scaled, takes the other slots.

    Exact rows keep their experts, and re-routable rows their first choice, if ``protect``; at least
    ``min_primary_experts`` are kept, and one. Without ``protect`` a row that would be left with
    nothing takes its best-scored kept expert, with all of its weight.

    Reads ``directed_scale [E, E]`` and ``directed_loss [E, E]``: see
    :mod:`sere_ray.calibration.routed`.
    """
    scores, layer = need_scores(scores), with_modes(layer)
    kept = keep(ask(topk_ids, topk_weights, scores, row_kind, layer, row_weight), layer)
    return stand_in(kept, topk_ids, topk_weights, scores, row_kind, layer)


def ask(
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor,
    row_kind: Tensor,
    layer: Layer,
    row_weight: Tensor | None = None,
) -> Tensor:
    """What some rows want of each expert, ``[..., E]`` int64: numbers to add up over ranks.

    Demand of at most ``UNIT`` a rank, which is all that is told apart, and two counts below it.
    The layer, here and below, is one of :func:`with_modes`.
    """
    rows = changeable_rows(topk_ids, row_kind, layer.num_experts)
    read = read_anyway(topk_ids, row_kind, layer.num_experts)
    named = read | named_by(topk_ids, rows, layer.num_experts)
    anyway = top_of_rows(topk_ids, topk_weights, row_kind, layer, 1) if layer.protect else read
    wanted = demand(topk_ids, scores, row_kind, layer, row_weight).clamp(max=UNIT)
    return wanted * _DEMAND + anyway.long() * _ANYWAY + named.long() * _NAMED


def keep(asked: Tensor, layer: Layer) -> Tensor:
    """``[..., E]`` bool: the experts that are kept, all of which somebody named.

    Args:
        asked: sums of :func:`ask` over less than 2^14 ranks.
        layer: as there.
    """
    named, anyway = is_named(asked), asked // _ANYWAY % (_DEMAND // _ANYWAY) > 0
    wanted = wanted_of(asked).masked_fill(anyway, UNIT + 1).masked_fill(~named, -1)
    loss = loss_units(layer.statistic("directed_loss"), modes_of(layer).limit)
    kept = cannot_be_spared(wanted, anyway, loss, demand_units(layer.tau))
    kept = named & best_experts(kept, wanted, max(layer.min_primary_experts, 1))
    return held(kept, named, wanted, layer)


def demand_given_up(asked: Tensor, layer: Layer) -> Tensor:
    """``[...]`` int64: demand for experts that the rule alone, without ``guard``, does not keep.

    What stands in for them does not count: it is what a stand-in must make up for.

    Args:
        asked: as of :func:`keep`.
        layer: as there.
    """
    kept = keep(asked, replace(layer, guard=False))
    return given_up(kept, is_named(asked), wanted_of(asked))


def wanted_of(asked: Tensor) -> Tensor:
    """``[..., E]`` int64: the demand in sums of :func:`ask`; beyond ``UNIT`` nothing is told
    apart."""
    return (asked // _DEMAND).clamp(max=UNIT)


def is_named(asked: Tensor) -> Tensor:
    """``[..., E]`` bool: the experts that somebody named."""
    return asked % _ANYWAY > 0


def has_stand_ins(directed_loss: Tensor) -> bool:
    """Whether half of the experts have a stand-in that leaves less than ``STANDS_IN`` over.

    Args:
        directed_loss: ``[E, E]`` float32.
    """
    return bool(directed_loss.amin(dim=-1).median() < STANDS_IN)


class Modes(NamedTuple):
    """The three knobs of a layer: see :class:`~sere_ray.rules.interface.Layer`."""

    lead: float
    limit: float
    protect: bool


WITH_STAND_INS = Modes(lead=0.0, limit=1.0, protect=False)
"""Every slot goes to one, demand is weight, and first choices are like others."""
WITHOUT_STAND_INS = Modes(lead=1.0, limit=0.0, protect=True)
"""Slots are dropped, demand is lead, and first choices are kept."""


def modes_of(layer: Layer) -> Modes:
    """The knobs that were given, and for the others what the layer's statistics suggest."""
    if layer.lead is not None and layer.limit is not None and layer.protect is not None:
        return Modes(layer.lead, layer.limit, layer.protect)
    stands_in = has_stand_ins(layer.statistic("directed_loss"))
    usual = WITH_STAND_INS if stands_in else WITHOUT_STAND_INS
    return Modes(
        lead=usual.lead if layer.lead is None else layer.lead,
        limit=usual.limit if layer.limit is None else layer.limit,
        protect=usual.protect if layer.protect is None else layer.protect,
    )


def with_modes(layer: Layer) -> Layer:
    """The layer with the three knobs of :func:`modes_of` filled in."""
    return replace(layer, **modes_of(layer)._asdict())


def loss_units(loss: Tensor, limit: float) -> Tensor:
    """``[E, E]`` int64: losses of 0..1 in 1/256. Above the limit everything is lost."""
    units = torch.where(loss <= limit, (loss.clamp(0, 1) * LOSS_UNIT).round(), LOSS_UNIT)
    return units.long().fill_diagonal_(LOSS_UNIT)


def cannot_be_spared(wanted: Tensor, anyway: Tensor, loss: Tensor, tau: int) -> Tensor:
    """``[..., E]`` bool, decided from the most demanded expert to the least.

    An expert is kept if its demand is above ``tau``, and so is its demand times the loss of every
    kept expert before it; equal demand: the lowest index is first. All at once, in rounds: what
    nobody undecided could stand in for is kept, what a kept one can stand in for is not.

    Args:
        wanted: ``[..., E]`` int64, demand; -1 of those that nobody named.
        anyway: ``[..., E]`` bool, kept in any case.
        loss: ``[E, E]`` int64, :func:`loss_units`.
        tau: in units of demand.
    """
    num_experts = wanted.shape[-1]
    index = torch.arange(num_experts, device=wanted.device)
    own, other = wanted[..., :, None], wanted[..., None, :]
    is_before = (other > own) | ((other == own) & (index < index[:, None]))
    suffices = is_before & (other >= 0) & (own * loss <= tau * LOSS_UNIT)
    kept = anyway.clone()
    undecided = (wanted > tau) & ~anyway
    while bool(undecided.any()):
        spared = undecided & (suffices & kept[..., None, :]).any(dim=-1)
        undecided = undecided & ~spared
        waits = (suffices & undecided[..., None, :]).any(dim=-1)
        kept = kept | (undecided & ~waits)
        undecided = undecided & waits
    return kept


def stand_in(
    kept: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor,
    row_kind: Tensor,
    layer: Layer,
) -> Choice:
    """What rows take of the kept experts, ``[..., E]`` bool."""
    rows = changeable_rows(topk_ids, row_kind, layer.num_experts)
    chosen = torch.where(rows[..., None], topk_ids, 0).long()
    of_slots = kept[..., None, None, :]
    loss = layer.statistic("directed_loss")[chosen].masked_fill(~of_slots, torch.inf)
    best = loss.argmin(dim=-1)  # the first of equal ones
    fits = loss.gather(-1, best[..., None])[..., 0] <= modes_of(layer).limit
    scale = torch.where(fits, layer.statistic("directed_scale")[chosen, best], 0.0)
    served = of_slots.expand(loss.shape).gather(-1, chosen[..., None])[..., 0]
    moved = rows[..., None] & ~served
    weights = topk_weights.float()
    new_ids = torch.where(moved, torch.where(scale != 0, best.to(topk_ids.dtype), -1), topk_ids)
    new_weights = torch.where(moved, weights * scale, weights)
    left_with_nothing = rows & (new_ids < 0).all(dim=-1)
    if bool(left_with_nothing.any()):
        best_scored = scores.masked_fill(~kept[..., None, :], -1.0).argmax(dim=-1)
        first = torch.zeros_like(new_ids, dtype=torch.bool)
        first[..., 0] = left_with_nothing
        everything = weights.sum(dim=-1, keepdim=True).expand_as(weights)
        new_ids = torch.where(first, best_scored[..., None].to(topk_ids.dtype), new_ids)
        new_weights = torch.where(first, everything, new_weights)
    return merge_repeated(
        new_ids,
        new_weights.to(topk_weights.dtype),
        row_kind=row_kind,
        num_experts=layer.num_experts,
    )
