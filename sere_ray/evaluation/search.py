"""The search for a rule's best setting within a budget: the same for ours and for every peer.

A rule whose strength is a number that can be chosen finely is searched: its strength by bisection;
then what else it has, one knob after the other; then a strength for every layer; then its strength
again. A rule that has S alone has few settings, and all of them are tried.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sere_ray.evaluation.budget import Candidate
from sere_ray.evaluation.grids import (
    FAMILIES,
    STRENGTH,
    Routing,
    listed,
    with_servers_floor,
    with_strength,
)

_BISECTIONS = 8
_SHAPES: Mapping[str, tuple[tuple[str, tuple[Any, ...]], ...]] = {
    "margin": (
        ("runners_up", (2, 4, 8, 16)),
        ("fill", (0.25, 0.5, 0.75, 1.0)),
        ("beta", (0.0, 0.25, 0.5, 0.75, 1.0)),
    ),
    "spare": (
        ("lead", (0.0, 0.5, 0.8, 1.0)),
        ("limit", (0.0, 0.8, 1.0)),
        ("protect", (True, False)),
        ("runners_up", (4, 8, 16)),
    ),
    "lynx": (
        ("alpha", (1.0, 2.0, 4.0, 8.0)),
        ("base", (1.5, 2.0, 3.0, 4.0)),
        ("depth", (1, 2, 4, 8, 16)),
    ),
    "ace": (("rcr_scale", (0.0, 0.1, 0.3, 1.0)),),
}
"""Knobs that are tried one after the other; ``xshare``, ``exfold`` and ``mone`` have none."""
_PER_LAYER = {"tau": (0.5, 2.0), "experts": (0.8, 1.25)}
"""Factors that each layer's strength is tried with."""
_SLOPE = 0.03
"""Difference in strength, to either side, over which a slope is taken."""
Keys = dict[str, Any]
Try = Callable[[Keys], Candidate]


def best_setting(attempt: Try, rule: str, routing: Routing) -> Candidate | None:
    """The setting of a rule that reads the fewest experts and fits; None where none does.

    Args:
        attempt: measures a setting and holds it against the budget.
        rule: its name.
        routing: of the text that settings are tried on.
    """
    if rule in STRENGTH:
        return _searched(attempt, rule, routing)
    settings = with_servers_floor(listed(rule, routing.top_k))
    fitting = [c for c in map(attempt, settings) if c.fits]
    return min(fitting, key=lambda candidate: candidate.reads, default=None)


def _searched(attempt: Try, rule: str, routing: Routing) -> Candidate | None:
    knob, size = STRENGTH[rule], routing.num_experts
    start = {"rule": rule, **FAMILIES.get(rule, ({},))[0]}
    first, strength = _strongest(attempt, start, knob, size)
    if first is None:
        return None
    slope = _slope(attempt, first.keys, knob, strength, size)

    def worth(candidate: Candidate) -> float:  # at equal reads, the least log KL
        return candidate.log_kl + slope * candidate.reads

    current = first
    for name, values in _SHAPES.get(rule, ()):
        tried = [attempt({**current.keys, name: value}) for value in values]
        current = min([current, *tried], key=worth)
    parts = [current.keys[knob]] * routing.num_layers
    for layer in range(routing.num_layers):
        for factor in _PER_LAYER[knob]:
            other = list(parts)
            other[layer] = _scaled(parts[layer], factor, size)
            found = attempt({**current.keys, knob: other})
            if worth(found) < worth(current):
                parts, current = other, found
    tuned, _ = _strongest(attempt, {**current.keys, knob: parts}, knob, size)
    fitting = [c for c in (first, tuned) if c is not None]
    return min(fitting, key=lambda candidate: candidate.reads)


def _strongest(
    attempt: Try, keys: Keys, knob: str, num_experts: int
) -> tuple[Candidate | None, float]:
    """Bisection: stronger, until the budget is spent."""
    low, high, best = 0.0, 1.0, None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        found = attempt(with_strength(keys, knob, middle, num_experts))
        if found.fits:
            low, best = middle, found
        else:
            high = middle
    return best, low


def _slope(attempt: Try, keys: Keys, knob: str, strength: float, num_experts: int) -> float:
    """How much log KL falls with one more expert, around a setting."""
    less, more = (
        attempt(with_strength(keys, knob, min(max(strength + step, 0.0), 1.0), num_experts))
        for step in (_SLOPE, -_SLOPE)
    )
    return max((less.log_kl - more.log_kl) / max(more.reads - less.reads, 1e-3), 0.0)


def _scaled(value: float, factor: float, num_experts: int) -> float | int:
    if isinstance(value, int):
        return min(max(round(value * factor), 1), num_experts)
    return min(float(f"{value * factor:.3g}"), 1.0)
