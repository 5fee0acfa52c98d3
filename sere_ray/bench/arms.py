"""Settings that decode-step benchmarks time: stock, off, `sere` by S, `margin`, `spare`, masks."""

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sere_ray.bench.models import Model
from sere_ray.policy.policy import Policy

_TAUS = [0.0, *(2 ** (n / 2 - 20) for n in range(41))]
"""Values that are tried for tau: 0, and 2**-20 to 1 by factors of 1.4."""


@dataclass(frozen=True)
class Arm:
    """One setting that is measured."""

    name: str
    policy: Policy | None
    """None: an engine without the key."""
    budget: int | None = None
    """Of ``margin``: experts it may read, or first choices if those are more; None: as S = 2."""
    back_end: str = "auto"
    """Of the stock engine."""

    @property
    def select_top_k(self) -> int | None:
        """S of the arm; None for stock."""
        return self.policy.select_top_k if self.policy else None


def arms(similarity: str, model: Model, masks: str | None = None) -> list[Arm]:
    """Stock, the rule discarded (`observe`), S = K, K/2, 2, 1 without floor, margin and spare.

    Args:
        similarity: path of the artifact.
        model: what is served.
        masks: path of masks with one level: adds it alone, and before ``margin``. An engine has
            them from its start on, so the other arms have them, too, at level 0.
    """
    files = {"similarity": similarity} | ({"masks": masks, "level": 0} if masks else {})
    common = {**files, "min_primary_experts": 0}

    def policy(select_top_k: int, mode: str = "on") -> Policy:
        return Policy.parse({**common, "select_top_k": select_top_k, "mode": mode})

    sizes = sorted({model.top_k, model.top_k // 2, 2, 1}, reverse=True)
    margin = Policy.parse({**common, "rule": "margin", "tau": _TAUS[0]})
    best, *others = model.stock_back_ends
    return [
        Arm("stock", None, back_end=best),
        *(Arm(f"stock, {back_end}", None, back_end=back_end) for back_end in others),
        Arm("off", policy(1, "off")),
        Arm("observe", policy(1, "observe")),
        *(Arm(f"S={size}", policy(size)) for size in sizes),
        Arm("margin", margin),
        Arm("margin-24", margin, budget=24),
        Arm("spare", Policy.parse({**common, "rule": "spare", "tau": _TAUS[0]})),
        *([] if masks is None else _with_masks(files, margin)),
    ]


def _with_masks(files: Mapping[str, object], margin: Policy) -> list[Arm]:
    return [
        Arm("masks", Policy.parse({**files, "level": 1, "rule": "none"})),
        Arm("masks+margin", margin.model_copy(update={"level": 1})),
    ]


def with_most_tau(margin: Arm, suffices: Callable[[Arm], bool]) -> Arm:
    """``margin`` with the largest tau that suffices, or with none.

    Args:
        margin: with any tau.
        suffices: whether a setting does; if it does, each smaller tau does, too.
    """
    trials = _trials(margin)
    fewer = bisect.bisect_left(trials, True, key=lambda trial: not suffices(trial))
    return trials[max(fewer - 1, 0)]


def with_least_tau(margin: Arm, suffices: Callable[[Arm], bool]) -> Arm:
    """``margin`` with the smallest tau that suffices, or with the largest of all.

    Args:
        margin: with any tau.
        suffices: whether a setting does; if it does, each larger tau does, too.
    """
    trials = _trials(margin)
    return trials[min(bisect.bisect_left(trials, True, key=suffices), len(trials) - 1)]


def _trials(margin: Arm) -> list[Arm]:
    assert margin.policy
    policies = [margin.policy.model_copy(update={"tau": tau}) for tau in _TAUS]
    return [replace(margin, policy=policy) for policy in policies]
