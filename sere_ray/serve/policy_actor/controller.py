"""Mode ``auto``: hold a target by moving along a list of policies, as little as the load demands.

Pure: no clock, no Ray, no engine. One observation per interval goes in, a level comes out; level 0
is exact routing, higher levels re-route more.

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

from dataclasses import dataclass, field
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Target(BaseModel):
    """What to hold."""

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
    """One interval."""

    tpot_ms: float | None
    """p90 of requests; None where none has been counted."""
    load: float
    """Decode rows per step, over the gang; 0 without a row that may be re-routed."""
    rerouted_share: float
    """Re-routed slots over all slots of decode rows."""


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

    target: Target
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
        """Take one interval into account."""
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


def _why_up(seen: Observation, target: Target) -> str:
    if target.tpot_ms is None:
        return f"re-routed share {seen.rerouted_share:.3f} <= {target.max_rerouted_share:.3f}"
    return f"p90 {seen.tpot_ms:.1f} ms > {target.tpot_ms:.1f} ms"
