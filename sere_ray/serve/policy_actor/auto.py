"""Mode ``auto``: hold a target by moving along a list of policies, as little as the load demands.

The policy actor reads the counters of all ranks every ``interval_s`` seconds and hands them to
:class:`AutoPilot`. Its :class:`Controller` chooses a level: level 0 is exact routing, higher levels
re-route more. Engines never hear of ``auto``: they get the policy of the level, like any other.
Everything here is pure: no clock, no Ray, no engine.

- **Up** one level when the time per output token has been above the target for ``patience``
  intervals in a row.
- **Down** one level when it has been clearly below the target *and* the load clearly below that at
  which the level was entered, for ``patience`` intervals. The second condition is what keeps it
  from oscillating: at a constant load the time falls because of the level, so the time alone would
  undo every step.
- **Floor**: where the re-routed share of slots, or the score of the level's answers
  (``observe/score.py``), is above its limit, down at once, and that level and those above it stay
  closed until the load has changed clearly. With a limit for the score a level is left upward only
  when it has one.
- An interval without a row leads straight to exact: there is nothing to save. One in which rows
  were computed but no time has been counted yet says nothing about the time.
- Without a target for the time it goes up as far as the floors allow.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sere_ray.observe.score import VersionSums
from sere_ray.observe.stats import STEP_KINDS, by_replica, since, totals
from sere_ray.policy.policy import Policy
from sere_ray.serve.policy_actor.auto_config import AutoConfig, AutoTarget, level_policies
from sere_ray.util.token_times import quantile_ms

LEAST_ANSWERS = 8
"""Scored answers of a level before their mean says anything."""


@dataclass(frozen=True)
class Observation:
    """What the engines did in one interval."""

    tpot_ms: float | None
    """p90 of requests' time per output token, milliseconds; None where none has been counted."""
    load: float
    """Mean decode rows of a step of a gang; 0 if no row could be re-routed."""
    rerouted_share: float
    """Share of the decode rows' slots that were re-routed, 0..1."""
    score: float | None = None
    """Of the running level's answers, nats a token; None where too few have been scored."""


@dataclass(frozen=True)
class Decision:
    """Level from now on, and why it changed (empty: it did not)."""

    level: int
    reason: str = ""


@dataclass
class Controller:
    """Chooses a level.

    Args:
        target: what to hold.
        levels: how many there are, exact included.
    """

    target: AutoTarget
    levels: int
    level: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Start exact."""
        assert self.levels >= 1
        self._entered_at = [0.0] * self.levels
        self._slow = self._fast = 0
        self._closed_from = self.levels
        self._closed_at = 0.0

    def observe(self, seen: Observation) -> Decision:
        """Choose the level for what one interval showed."""
        if not seen.load:
            return self._go(0, "idle") if self.level else Decision(0)
        target, margin = self.target, self.target.margin
        if self._closed_from < self.levels and abs(seen.load - self._closed_at) > (
            margin * self._closed_at
        ):
            self._closed_from = self.levels
        below = _why_down(seen, target) if self.level else ""
        if below:
            self._closed_from, self._closed_at = self.level, seen.load
            return self._go(self.level - 1, below)
        if target.tpot_ms is None:
            is_slow, is_fast = True, False
        elif seen.tpot_ms is None:
            return Decision(self.level)
        else:
            is_slow = seen.tpot_ms > target.tpot_ms
            is_fast = seen.tpot_ms < (1 - margin) * target.tpot_ms
        has_eased = seen.load < (1 - margin) * self._entered_at[self.level]
        self._slow = self._slow + 1 if is_slow else 0
        self._fast = self._fast + 1 if is_fast and has_eased else 0
        next_level = self.level + 1
        is_open = next_level < min(self.levels, self._closed_from)
        is_scored = not self.level or target.max_score is None or seen.score is not None
        if self._slow >= target.patience and is_open and is_scored:
            self._entered_at[next_level] = seen.load
            return self._go(next_level, _why_up(seen, target))
        if self.level and self._fast >= target.patience:
            return self._go(self.level - 1, f"load fell to {seen.load:.1f} rows")
        return Decision(self.level)

    def _go(self, level: int, reason: str) -> Decision:
        self.level, self._slow, self._fast = level, 0, 0
        return Decision(level, reason)


def _why_down(seen: Observation, target: AutoTarget) -> str:
    """Which quality floor is broken; empty: none."""
    if seen.rerouted_share > target.max_rerouted_share:
        return f"re-routed share {seen.rerouted_share:.3f} > {target.max_rerouted_share:.3f}"
    if target.max_score is not None and seen.score is not None and seen.score > target.max_score:
        return f"score {seen.score:.4f} > {target.max_score:.4f} nats"
    return ""


def _why_up(seen: Observation, target: AutoTarget) -> str:
    if target.tpot_ms is None:
        return f"re-routed share {seen.rerouted_share:.3f} <= {target.max_rerouted_share:.3f}"
    return f"p90 {seen.tpot_ms:.1f} ms > {target.tpot_ms:.1f} ms"


class AutoPilot:
    """Levels, the controller that chooses one, and what it saw last.

    Args:
        base: keys that no level sets.
        config: target and levels.
        top_k: K of the model.

    Raises:
        PolicyError: a level is not valid for the model, or not stronger than the one before.
    """

    def __init__(self, base: Policy, config: AutoConfig, top_k: int) -> None:
        self.config, self._top_k = config, top_k
        self.rebase(base)
        self._controller = Controller(config, len(self.policies))
        self._counters: dict[str, Mapping[str, Any]] = {}
        self._seen: Observation | None = None

    def rebase(self, base: Policy) -> None:
        """Change keys that no level sets; the level stays.

        Raises:
            PolicyError: with them a level is not valid; then nothing has changed.
        """
        self.policies = level_policies(base, self.config, self._top_k)
        self.base = base

    @property
    def policy(self) -> Policy:
        """The policy of the level that holds."""
        return self.policies[self._controller.level]

    def observe(self, replicas: Iterable[Mapping[str, Any]]) -> Decision:
        """Choose the level for what the ranks counted since the last call.

        A rank that did not answer, now or the last time, is left out. If all are, nothing changes.

        Args:
            replicas: each with ``replica``, ``gang``, ``version`` of the policy and ``counters``
                (None: it did not answer).
        """
        replicas = list(replicas)
        counted = since(replicas, self._counters)
        self._counters = by_replica(replicas)
        if not counted:
            return Decision(self._controller.level)
        self._seen = _observation(totals(counted), max(r["version"] for r in counted))
        return self._controller.observe(self._seen)

    def status(self) -> dict[str, Any]:
        """Fields of ``AutoStatus`` in the control API."""
        seen = self._seen
        return {
            "level": self._controller.level,
            "levels": len(self.policies),
            "tpot_ms": None if seen is None else seen.tpot_ms,
            "load": None if seen is None else seen.load,
            "rerouted_share": None if seen is None else seen.rerouted_share,
            "score": None if seen is None else seen.score,
            "base": self.base.model_dump(),
        }


def _observation(total: Mapping[str, Any], version: int) -> Observation:
    kinds = [total[kind] for kind in STEP_KINDS]
    steps, rows, slots = (sum(k[name] for k in kinds) for name in ("steps", "decode_rows", "slots"))
    rerouted = sum(sum(k["slots_rerouted"]) for k in kinds)
    return Observation(
        tpot_ms=quantile_ms(total["token_times"], 0.9),
        load=rows / steps if steps else 0.0,
        rerouted_share=rerouted / slots if slots else 0.0,
        score=_score(total, version),
    )


def _score(total: Mapping[str, Any], version: int) -> float | None:
    """Of the answers that this version re-routed: every move of a level makes a version."""
    for each in map(VersionSums.model_validate, total["scores"]["versions"]):
        if (each.version, each.tier) == (version, "default") and each.answers >= LEAST_ANSWERS:
            return each.nats
    return None
