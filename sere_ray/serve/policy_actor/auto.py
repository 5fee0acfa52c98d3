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
- **Floor**: where the re-routed share of slots is above the limit, down at once, and that level and
  those above it stay closed until the load has changed clearly.
- An interval without a row leads straight to exact: there is nothing to save. One in which rows
  were computed but no time has been counted yet says nothing about the time.
- Without a target for the time it goes up as far as the floor allows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sere_ray.observe.stats import STEP_KINDS, by_replica, since, totals
from sere_ray.policy.policy import Policy
from sere_ray.util.errors import PolicyError
from sere_ray.util.token_times import quantile_ms

AUTO = "auto"
"""Name of the mode where one is asked for. No policy has it: a policy is that of a level."""


class AutoTarget(BaseModel):
    """What mode ``auto`` holds: a time per output token, a limit of re-routed slots, or both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tpot_ms: float | None = Field(
        None,
        gt=0,
        description="p90 of requests' time per output token (TPOT), milliseconds; null = re-route "
        "as much as max_rerouted_share allows",
    )
    max_rerouted_share: float = Field(
        1.0, ge=0, le=1, description="quality floor: most slots of decode rows that may move"
    )
    margin: float = Field(0.15, gt=0, lt=1, description="how much below counts as clearly below")
    patience: int = Field(3, ge=1, description="intervals in a row before a level changes")

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        if self.tpot_ms is None and "max_rerouted_share" not in self.model_fields_set:
            raise ValueError("give tpot_ms, max_rerouted_share or both: what to hold")
        return self


@dataclass(frozen=True)
class Observation:
    """What the engines did in one interval."""

    tpot_ms: float | None
    """p90 of requests' time per output token, milliseconds; None where none has been counted."""
    load: float
    """Mean decode rows of a step of a gang; 0 if no row could be re-routed."""
    rerouted_share: float
    """Share of the decode rows' slots that were re-routed, 0..1."""


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
        if self.level and seen.rerouted_share > target.max_rerouted_share:
            self._closed_from, self._closed_at = self.level, seen.load
            return self._go(
                self.level - 1,
                f"re-routed share {seen.rerouted_share:.3f} > {target.max_rerouted_share:.3f}",
            )
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
        if self._slow >= target.patience and next_level < min(self.levels, self._closed_from):
            self._entered_at[next_level] = seen.load
            return self._go(next_level, _why_up(seen, target))
        if self.level and self._fast >= target.patience:
            return self._go(self.level - 1, f"load fell to {seen.load:.1f} rows")
        return Decision(self.level)

    def _go(self, level: int, reason: str) -> Decision:
        self.level, self._slow, self._fast = level, 0, 0
        return Decision(level, reason)


def _why_up(seen: Observation, target: AutoTarget) -> str:
    if target.tpot_ms is None:
        return f"re-routed share {seen.rerouted_share:.3f} <= {target.max_rerouted_share:.3f}"
    return f"p90 {seen.tpot_ms:.1f} ms > {target.tpot_ms:.1f} ms"


class Level(BaseModel):
    """Keys of a policy that make it stronger the smaller they are; those left out stay."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    select_top_k: int | None = Field(None, ge=1, description="S")
    threshold: float | None = Field(None, ge=0.0, le=1.0, description="rho; null = any stand-in")
    min_primary_experts: int | None = Field(None, ge=0, description="m; null = K of the model")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("a level must set one of " + ", ".join(type(self).model_fields))
        return self


class AutoConfig(AutoTarget):
    """The part ``auto`` of a deployment file."""

    interval_s: float = Field(2.0, ge=0.5, le=60, description="seconds between two looks")
    levels: tuple[Level, ...] = Field(
        min_length=1,
        max_length=16,
        description="changes of the policy, each stronger than the one before; exact routing is "
        "level 0 and not named",
    )


def level_policies(base: Policy, config: AutoConfig, top_k: int) -> list[Policy]:
    """The policy of every level, exact routing first.

    Args:
        base: keys that no level sets.
        config: the levels.
        top_k: K of the model.

    Raises:
        PolicyError: a level is not valid for the model, or not stronger than the one before.
    """
    if base.by_rows is not None:
        raise PolicyError(
            "policy.by_rows: mode 'auto' sets keys for steps of every size; leave by_rows out"
        )
    keys = base.model_dump()
    policies = [Policy.parse({**keys, "mode": "off"})]
    for number, level in enumerate(config.levels):
        where = f"auto.levels.{number}"
        changes = level.model_dump(exclude_unset=True)
        policy = Policy.parse({**keys, **changes, "mode": "on"}, where=where)
        policy.for_model(top_k=top_k, where=where)
        if number and not _is_stronger(policy, policies[-1], top_k):
            raise PolicyError(
                f"{where} = {changes}: must re-route more than the level before it: of "
                "select_top_k, threshold and min_primary_experts one must fall and none rise"
            )
        policies.append(policy)
    return policies


def _is_stronger(policy: Policy, than: Policy, top_k: int) -> bool:
    new, old = (policy.for_model(top_k=top_k), than.for_model(top_k=top_k))
    pairs = [
        (getattr(new, key) or 0, getattr(old, key) or 0)  # no threshold: any stand-in, as with 0
        for key in Level.model_fields
    ]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


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
            replicas: each with ``replica``, ``gang`` and ``counters`` (None: it did not answer).
        """
        replicas = list(replicas)
        counted = since(replicas, self._counters)
        self._counters = by_replica(replicas)
        if not counted:
            return Decision(self._controller.level)
        self._seen = _observation(totals(counted))
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
            "base": self.base.model_dump(),
        }


def _observation(total: Mapping[str, Any]) -> Observation:
    kinds = [total[kind] for kind in STEP_KINDS]
    steps, rows, slots = (sum(k[name] for k in kinds) for name in ("steps", "decode_rows", "slots"))
    rerouted = sum(sum(k["slots_rerouted"]) for k in kinds)
    return Observation(
        tpot_ms=quantile_ms(total["token_times"], 0.9),
        load=rows / steps if steps else 0.0,
        rerouted_share=rerouted / slots if slots else 0.0,
    )
