"""The rule ``margin``: an expert is read if the batch would miss it, not if a row names it.

A gate's K-th choice and its (K+1)-th are often as good as each other. What a row loses with a
chosen expert is therefore measured by its lead over the runners-up in what the gate ranks by, not
by its weight. The demand
for an expert is the sum of the squared leads over the rows that chose it; experts with more demand
than tau are kept, and every row's first choice. A slot whose expert is not kept goes to the row's
own best-scored kept expert, with less weight than its score says: the gate did not choose it.

Under expert parallelism a step waits for the rank that reads the most. There an expert saves
nothing unless the busiest ranks all lose one: ``balance_ranks`` decides by levels, see
:func:`of_level`. Of all ways to read at most n experts of a rank that gives up the least demand; so
the busiest ranks lose their least demanded experts until a level more would cost above tau. Rows'
first choices would end that early, as one rank often has most of them. So behind a plain gate they
are not kept at any price there: a row's demand for its first choice counts ``FIRST`` times.

Demand is a sum of integers, so that it is the same in whatever order rows and ranks are added up.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sere_ray.rules.common import (
    best_experts,
    changeable_rows,
    given_up,
    held,
    named_by,
    need_scores,
    place_in_rank,
    refill,
    top_of_rows,
)
from sere_ray.rules.gate import NEVER, in_units
from sere_ray.rules.interface import Choice, Layer

UNIT = 2**20
"""Demand of a lead of 1: integers are in units of 2^-20."""
FIRST = 8
"""What a row's demand for its first choice counts under ``balance_ranks``. With 4 KL rose where
first choices began to go, on the demo model; 8 and 16 gave the same there, and 8 goes further."""
WEIGHT_UNIT = 32
"""Weight of a row that is certain to count; a draft has less: see :func:`demand`."""
NAMED, DEMAND = 1, 2**16
"""What a row adds to an expert's number in :func:`ask`: once for naming it, and per unit."""


def margin(
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor | None,
    row_kind: Tensor,
    layer: Layer,
    row_weight: Tensor | None = None,
) -> Choice:
    """Keep what the batch demands more than ``tau``, and at least ``min_primary_experts``.

    With m = K a batch of one row is exact. Weights: :func:`sere_ray.rules.common.refill`.
    """
    scores = need_scores(scores)
    kept = keep(ask(topk_ids, topk_weights, scores, row_kind, layer, row_weight), layer)
    return refill_rows(kept, topk_ids, topk_weights, scores, row_kind, layer)


def ask(
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor,
    row_kind: Tensor,
    layer: Layer,
    row_weight: Tensor | None = None,
) -> Tensor:
    """What some rows want of each expert, ``[..., E]`` int64: numbers to add up over ranks.

    Of a rank at most ``UNIT + 1`` is told, which is more than any tau: so much is asked for what
    is kept anyway, experts of exact rows and, but for :func:`drops_first`, first choices.
    """
    rows = changeable_rows(topk_ids, row_kind, layer.num_experts)
    anyway = top_of_rows(topk_ids, topk_weights, row_kind, layer, 0 if drops_first(layer) else 1)
    first = topk_weights.argmax(dim=-1, keepdim=True) if drops_first(layer) else None
    wanted = demand(topk_ids, scores, row_kind, layer, row_weight, first).clamp(max=UNIT + 1)
    wanted = wanted.masked_fill(anyway, UNIT + 1)
    named = anyway | named_by(topk_ids, rows, layer.num_experts)
    return wanted * DEMAND + named.long() * NAMED


def keep(asked: Tensor, layer: Layer) -> Tensor:
    """``[..., E]`` bool: the experts that are kept, all of which somebody named.

    A row keeps its own kept choices, so each of them is read.

    Args:
        asked: sums of :func:`ask` over less than 2^16 ranks.
        layer: as there.
    """
    named, wanted = is_named(asked), wanted_of(asked)
    decisive = of_level(wanted, layer.owner) if layer.balance_ranks else wanted
    kept = named & (decisive > demand_units(layer.tau))
    # The floor is filled by demand with experts that somebody named.
    floor = max(layer.min_primary_experts, 1)
    kept = named & best_experts(kept, wanted.masked_fill(~named, -1), floor)
    return held(kept, named, wanted, layer)


def drops_first(layer: Layer) -> bool:
    """Whether a row may lose its first choice.

    Behind other gates than a plain one a row may go to some experts only: it could find none.
    """
    return layer.balance_ranks and layer.gate.is_plain


def demand_given_up(asked: Tensor, layer: Layer) -> Tensor:
    """``[...]`` int64: demand for experts that the rule alone, without ``guard``, does not keep.

    Args:
        asked: as of :func:`keep`.
        layer: as there.
    """
    kept = keep(asked, replace(layer, guard=False))
    return given_up(kept, is_named(asked), wanted_of(asked))


def wanted_of(asked: Tensor) -> Tensor:
    """``[..., E]`` int64: the demand in sums of :func:`ask`; beyond ``UNIT`` nothing is told
    apart."""
    return (asked // DEMAND).clamp(max=UNIT + 1)


def of_level(wanted: Tensor, owner: Tensor | None) -> Tensor:
    """``[..., E]`` int64: what is wanted of the level of each expert.

    Experts of equal place in the orders of their ranks are a level; the n-th one is what the
    busiest rank would read as its n-th expert. Sums fall from level to level. On one rank a level
    is one expert.

    Args:
        wanted: ``[..., E]`` int64, :func:`wanted_of`.
        owner: ``[E]`` int64, the rank that holds each expert; None = one rank holds all.
    """
    level = place_in_rank(wanted.argsort(dim=-1, descending=True, stable=True), owner)
    return torch.zeros_like(wanted).scatter_add_(-1, level, wanted).gather(-1, level)


def refill_rows(
    kept: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    scores: Tensor,
    row_kind: Tensor,
    layer: Layer,
) -> Choice:
    """What rows take of the kept experts, ``[..., E]`` bool."""
    ranks = None
    if not layer.gate.is_plain:
        changeable = changeable_rows(topk_ids, row_kind, layer.num_experts)
        ranks = in_units(scores, _chosen(topk_ids, changeable), layer.gate).ranks
    return refill(
        kept,
        topk_ids,
        topk_weights,
        scores,
        row_kind,
        beta=layer.beta,
        fill=layer.fill,
        ranks=ranks,
    )


def is_named(asked: Tensor) -> Tensor:
    """``[..., E]`` bool: the experts that somebody named."""
    return asked % DEMAND > 0


def demand_units(tau: float) -> int:
    """A demand as an integer."""
    return round(tau * UNIT)


def demand(
    topk_ids: Tensor,
    scores: Tensor,
    row_kind: Tensor,
    layer: Layer,
    row_weight: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """``[..., E]`` int64: sum over re-routable rows of lead squared, in units of 2^-20.

    A row's lead for a chosen expert is what the gate ranks it by (:func:`in_units`) less the mean
    of that of the ``runners_up`` best unchosen experts that the row may choose, at least 0, divided
    by the sum of the chosen scores.

    The same bits on every device: scores are integers (:func:`in_units`), so that their sums
    have no order. Then, in float32 and in this order, lead = (n r - sum of the n runners-up) / (sum
    of the chosen scores, times n), at most 2, squared, times 2^20, rounded half to even. A factor
    common to a row's scores cancels out, but for a sigmoid's or softplus's with a bias.

    A row that verifies a draft counts as far as it is likely to be accepted: times
    ``row_weight [..., T]``, an integer of 0 to ``WEIGHT_UNIT``, over that unit, rounded down. None
    is ``WEIGHT_UNIT`` for all rows. Before that its demand for the slot ``first [..., T, 1]`` is
    multiplied by ``FIRST``; None = for none.
    """
    rows = changeable_rows(topk_ids, row_kind, layer.num_experts)
    chosen = _chosen(topk_ids, rows)
    units, ranks = in_units(scores, chosen, layer.gate)
    total = units.gather(-1, chosen).sum(dim=-1, keepdim=True).clamp(min=1)
    most = min(layer.runners_up, layer.num_experts - topk_ids.shape[-1])
    others = ranks.scatter(-1, chosen, NEVER).topk(most, dim=-1).values
    found = others > NEVER
    # Without others a lead is what the gate ranks by itself.
    count = found.sum(dim=-1, keepdim=True).clamp(min=1)
    others = torch.where(found, others, 0).sum(dim=-1, keepdim=True)
    ahead = (count * ranks.gather(-1, chosen) - others).clamp(min=0).float()
    lead = (ahead / (total.float() * count)).clamp(max=2)  # 1 is above every tau
    if layer.lead is not None and layer.lead < 1:
        share = units.gather(-1, chosen).float() / total.float()
        lead = layer.lead * lead + (1 - layer.lead) * share
    wanted = torch.where(rows[..., None], (lead.square() * UNIT).round(), 0.0).long()
    if first is not None:
        wanted = wanted.scatter(-1, first, FIRST * wanted.gather(-1, first))
    if row_weight is not None:
        wanted = wanted * row_weight[..., None] // WEIGHT_UNIT
    asked = wanted.new_zeros((*wanted.shape[:-2], layer.num_experts))
    return asked.scatter_add_(-1, chosen.flatten(-2), wanted.flatten(-2))


def _chosen(topk_ids: Tensor, changeable: Tensor) -> Tensor:
    """``[..., T, K]`` int64: ids of changeable rows, 0 in others."""
    return torch.where(changeable[..., None], topk_ids, 0).long()
