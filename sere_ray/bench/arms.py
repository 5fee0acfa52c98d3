"""Settings that decode-step benchmarks time: stock, off, the rule `sere` by S, and `margin`."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from sere_ray.policy.policy import Policy

_TAUS = [0.0, *(2 ** (n / 2 - 20) for n in range(41))]
"""Values that are tried for tau of the arm ``margin``: 0, and 2**-20 to 1 by factors of 1.4."""


@dataclass(frozen=True)
class Arm:
    """One setting that is measured."""

    name: str
    policy: Policy | None
    """None: the engine without the key."""

    @property
    def select_top_k(self) -> int | None:
        """S of the arm; None for stock."""
        return self.policy.select_top_k if self.policy else None


def arms(similarity: str, top_k: int) -> list[Arm]:
    """Stock, the rule discarded (`observe`), S = K, K/2, 2 and 1 without floor, and ``margin``."""
    common = {"similarity": similarity, "min_primary_experts": 0}

    def policy(select_top_k: int, mode: str = "on") -> Policy:
        return Policy.parse({**common, "select_top_k": select_top_k, "mode": mode})

    sizes = sorted({top_k, top_k // 2, 2, 1}, reverse=True)
    return [
        Arm("stock", None),
        Arm("off", policy(1, "off")),
        Arm("observe", policy(1, "observe")),
        *(Arm(f"S={size}", policy(size)) for size in sizes),
        Arm("margin", Policy.parse({**common, "rule": "margin", "tau": _TAUS[0]})),
    ]


def with_most_tau(margin: Arm, suffices: Callable[[Arm], bool]) -> Arm:
    """``margin`` with the largest tau that suffices, or with none.

    Args:
        margin: with any tau.
        suffices: whether a setting does; if it does, each smaller tau does, too.
    """
    assert margin.policy
    trials = [Arm(margin.name, margin.policy.model_copy(update={"tau": tau})) for tau in _TAUS]
    fewer = bisect.bisect_left(trials, True, key=lambda trial: not suffices(trial))
    return trials[max(fewer - 1, 0)]
