"""Which settings of a rule are compared: from strong re-routing to light, by what a text's own
routing reads.

A number of kept experts means something else on every model: gates of one spread a batch over
nearly all experts, gates of another over half of them. So a grid is laid out over experts *read*:
from the union of first choices to the union of all choices, both measured, and for each number
between them the setting is sought that reads as many on the exact model's own routing. That needs
no forward pass of the model. What a setting reads in the end differs a little, since it changes
what later layers see.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from sere_ray.evaluation.decode_batches import DecodeBatches
from sere_ray.policy.bound import BoundPolicy

STRENGTH: Mapping[str, str] = {
    "xshare": "experts",
    "lynx": "experts",
    "exfold": "experts",
    "mone": "experts",
    "ace": "tau",
    "margin": "tau",
    "spare": "tau",
}
"""Rule -> the knob that says how strongly it re-routes. Other rules have S alone, of few values."""
FAMILIES: Mapping[str, tuple[dict[str, Any], ...]] = {
    "lynx": ({"alpha": 2.0, "base": 2.0}, {"alpha": 4.0, "base": 2.0}),
    "spare": (
        {},
        {"lead": 0.5},
        {"lead": 1.0, "limit": 0.0, "protect": True},
        {"lead": 0.0, "limit": 1.0, "protect": True},
        {"lead": 0.0, "limit": 1.0, "protect": False},
    ),
}
"""Rule -> its other knobs where they are tried in several ways; a search starts from the first."""
_PLACES = (-0.1, *np.linspace(0, 0.95, 9).tolist())
"""Where settings are sought: 0 = first choices alone, 1 = all choices. One is below first choices,
for rules that do not protect them."""
_THRESHOLDS = (None, 0.1, 0.2, 0.3, 0.5, 0.7)
_LEAST_TAU = 1e-6
_STEPS = 12
"""Most bisections for a place."""
_NEAR = 0.003
"""How far, in parts, a setting may be from its place."""
_RECORDED_STEPS = 16
Keys = dict[str, Any]


class Routing:
    """What the exact model's gates chose on some texts, and what a setting would read there.

    Args:
        chunk: the texts.
        bind: a setting for this model.
    """

    def __init__(self, chunk: DecodeBatches, bind: Callable[[Keys], BoundPolicy]) -> None:
        self.chunk, self.bind = chunk, bind
        self.num_layers = len(chunk.layers)
        self.num_experts = len(next(iter(chunk.layers.values())).gate_weight)
        self._rows = chunk.record(_RECORDED_STEPS)
        self.top_k = next(iter(self._rows.values()))[1].shape[-1]
        self._known: dict[tuple[str, int, int], float] = {}
        self._strengths: dict[tuple[str, int, int], dict[float, float]] = {}

    def reads(self, keys: Keys, batch: int, ranks: int = 1) -> float:
        """Experts for each layer and step that the busiest of so many ranks would read."""
        name = (json.dumps(keys, sort_keys=True), batch, ranks)
        if name not in self._known:
            texts = next(iter(self._rows.values()))[1].shape[1]
            texts -= texts % batch
            counts, rules = self.chunk.rules_of(self.bind(keys), texts, batch, ranks)
            with torch.inference_mode():
                for layer, row in self._rows.items():
                    rules[layer](layer, *(part[:, :texts].contiguous() for part in row))
            reads, _, busiest = counts.per_text(batch, len(rules))
            self._known[name] = float((busiest[ranks] if ranks > 1 else reads).mean())
        return self._known[name]

    def places(self, batch: int, ranks: int = 1) -> list[float]:
        """Numbers of experts to seek settings for, from few to many."""
        first, all_of_them = (
            self.reads({"rule": "topk", "select_top_k": size}, batch, ranks)
            for size in (1, self.top_k)
        )
        return [first + (all_of_them - first) * place for place in _PLACES]

    def at(self, keys: Keys, knob: str, reads: float, batch: int, ranks: int = 1) -> Keys:
        """The setting, its strength chosen so that it reads about so many experts.

        Args:
            keys: of the setting; a list of strengths, one a layer, keeps its proportions.
            knob: the key to choose.
            reads: the number sought.
            batch: B.
            ranks: as for :meth:`reads`.
        """
        family = json.dumps([{k: v for k, v in keys.items() if k != knob}, keys.get(knob)])
        known = self._strengths.setdefault((family, batch, ranks), {})
        for _ in range(_STEPS):
            low = max((s for s, number in known.items() if number > reads), default=0.0)
            high = min((s for s, number in known.items() if number <= reads), default=1.0)
            near = any(abs(number - reads) < _NEAR * reads for number in known.values())
            if near or high - low < 2.0**-_STEPS:
                break
            middle = (low + high) / 2
            setting = with_strength(keys, knob, middle, self.num_experts)
            known[middle] = self.reads(setting, batch, ranks)
        best = min(known, key=lambda strength: abs(known[strength] - reads))
        return with_strength(keys, knob, best, self.num_experts)


def with_strength(keys: Keys, knob: str, strength: float, num_experts: int) -> Keys:
    """A setting with another strength, from 0, the lightest, to 1; logarithmic between them.

    A list in ``keys``, one number a layer, is taken for proportions.
    """
    light, strong = (_LEAST_TAU, 1.0) if knob == "tau" else (float(num_experts), 1.0)
    value = float(light ** (1 - strength) * strong**strength)
    parts = keys.get(knob)
    if isinstance(parts, list):
        usual = float(np.exp(np.mean(np.log(parts))))
        return {**keys, knob: [_rounded(knob, value * p / usual, num_experts) for p in parts]}
    return {**keys, knob: _rounded(knob, value, num_experts)}


def _rounded(knob: str, value: float, num_experts: int) -> float | int:
    """A tau of three digits from 0 to 1, or a number of experts."""
    if knob == "tau":
        return min(float(f"{value:.3g}"), 1.0)
    return min(max(round(value), 1), num_experts)


def listed(rule: str, top_k: int) -> list[Keys]:
    """All settings of a rule whose strength is S; published rules have no floor."""
    sizes = range(1, top_k)
    found: dict[str, list[Keys]] = {
        "sere": [
            {"select_top_k": size, "threshold": rho, "min_primary_experts": 0}
            for size in sizes
            for rho in _THRESHOLDS
        ],
        "topk": [{"select_top_k": size} for size in sizes],
        "oea": [{"select_top_k": size} for size in sizes],
        "k1k2": [
            {"select_top_k": size, "normalise_over": factor * top_k}
            for size in sizes
            for factor in (1, 2)
        ],
    }
    return [{"rule": rule, **keys} for keys in found[rule]]


def with_servers_floor(settings: list[Keys]) -> list[Keys]:
    """The same with the floor that a server has where nobody says."""
    return [{k: v for k, v in keys.items() if k != "min_primary_experts"} for keys in settings]


def grid(rule: str, routing: Routing, batch: int) -> list[Keys]:
    """Settings of a rule at a batch size, without ``similarity``."""
    if rule not in STRENGTH:
        return listed(rule, routing.top_k)
    return sweep([{"rule": rule, **keys} for keys in FAMILIES.get(rule, ({},))], routing, batch)


def sweep(families: list[Keys], routing: Routing, batch: int) -> list[Keys]:
    """Each family of settings at every place."""
    return _distinct(
        routing.at(keys, STRENGTH[keys["rule"]], reads, batch)
        for keys in families
        for reads in routing.places(batch)
    )


def rank_grid(rule: str, ranks: int, routing: Routing, batch: int) -> list[Keys]:
    """Further settings of rules that look at where experts lie, for this number of ranks."""
    families: dict[str, tuple[Keys, str]] = {
        "xshare": ({"experts": routing.num_experts}, "max_per_rank"),
        "margin": ({"balance_ranks": True}, "tau"),
    }
    if ranks == 1 or rule not in families:
        return []
    keys, knob = families[rule]
    return _distinct(
        routing.at({"rule": rule, **keys}, knob, reads, batch, ranks)
        for reads in routing.places(batch, ranks)
    )


def _distinct(settings: Any) -> list[Keys]:
    """The settings, each once, in order."""
    found: list[Keys] = []
    for keys in settings:
        if keys not in found:
            found.append(keys)
    return found
