"""The rules of demand, ``margin`` and ``spare``, in the halves that ranks and measurements need."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from sere_ray.rules import margin, spare
from sere_ray.rules.interface import Choice, Layer


class DemandRule(NamedTuple):
    """A rule in two halves: what rows ask of experts, which adds up over ranks, and what follows.

    Arguments are those of :mod:`sere_ray.rules.margin`.
    """

    settle: Callable[[Layer], Layer]
    """Fills in what the layer's statistics say."""
    ask: Callable[..., Tensor]
    keep: Callable[..., Tensor]
    is_named: Callable[[Tensor], Tensor]
    take: Callable[..., Choice]
    given_up: Callable[[Tensor, Layer], Tensor]
    """``[...]`` int64, of what was asked and a settled layer: demand for experts not kept."""


DEMAND_RULES = {
    "margin": DemandRule(
        lambda layer: layer,
        margin.ask,
        margin.keep,
        margin.is_named,
        margin.refill_rows,
        margin.demand_given_up,
    ),
    "spare": DemandRule(
        spare.with_modes,
        spare.ask,
        spare.keep,
        spare.is_named,
        spare.stand_in,
        spare.demand_given_up,
    ),
}
"""By the name of the rule."""
