"""How strongly a rule may re-route one model for a given loss: what turns `loss` into tau.

A tau means something else on every model. `sere-ray strength` measures, on the model itself, what a
rule loses at some taus and numbers of rows; this is what it found, and how it is read.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sere_ray.util.errors import ArtifactError


class Stage(NamedTuple):
    """The numbers of steps of at most so many re-routable rows."""

    up_to: int
    tau: float
    most: tuple[int, ...]
    """By layer: the most demand that a step of the measurement gave up, in units of 2^-20."""


class StrengthCurve(BaseModel):
    """One number of rows: taus from light to strong, and what each did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int = Field(ge=1, description="re-routable rows of a step")
    tau: tuple[float, ...] = Field(min_length=2, description="rising, above 0")
    loss: tuple[float, ...] = Field(description="relative loss of the worst task; never falls")
    most: tuple[tuple[int, ...], ...] = Field(
        description="by tau and layer: most demand that a step gave up, in units of 2^-20"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = {len(self.tau), len(self.loss), len(self.most)}
        rises = all(a < b for a, b in itertools.pairwise(self.tau))
        falls = any(a > b for a, b in itertools.pairwise(self.loss))
        if len(sizes) > 1 or not rises or falls or self.tau[0] <= 0 or self.loss[0] <= 0:
            raise ValueError(f"the curve of {self.rows} rows does not rise from above 0")
        return self

    def place(self, loss: float) -> float:
        """Where a loss is among the taus, 0 to their number less 1; between two by logarithms."""
        if loss >= self.loss[-1]:
            return len(self.tau) - 1.0
        upper = max(bisect_left(self.loss, loss), 1)
        low, high = math.log(self.loss[upper - 1]), math.log(self.loss[upper])
        part = 0.0 if high == low else (math.log(loss) - low) / (high - low)
        return upper - 1 + min(max(part, 0.0), 1.0)

    def at(self, loss: float) -> Stage:
        """Tau for a loss, and what a step may give up there."""
        place = self.place(loss)
        low = min(int(place), len(self.tau) - 2)
        part = place - low
        tau = math.exp(_between(math.log(self.tau[low]), math.log(self.tau[low + 1]), part))
        most = tuple(
            round(_between(a, b, part))
            for a, b in zip(self.most[low], self.most[low + 1], strict=True)
        )
        return Stage(self.rows, float(f"{tau:.4g}"), most)


class Strength(BaseModel):
    """What `loss` means for one rule with its defaults on the model of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    curves: tuple[StrengthCurve, ...] = Field(min_length=1, description="by rising rows")
    tasks: tuple[str, ...] = Field(description="of which `loss` is the worst one's")
    items: int = Field(description="asked of all tasks and taus")
    data: str = Field(description="name of the text")

    @model_validator(mode="after")
    def _check(self) -> Self:
        rows = [curve.rows for curve in self.curves]
        layers = {len(most) for curve in self.curves for most in curve.most}
        if rows != sorted(set(rows)) or len(layers) > 1:
            raise ValueError("curves must be of rising rows and of the same layers")
        return self

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest loss that say something."""
        return (
            max(curve.loss[0] for curve in self.curves),
            max(curve.loss[-1] for curve in self.curves),
        )

    def stages(self, loss: float) -> list[Stage]:
        """Tau by the rows of a step, from small steps to the largest, which holds for more, too.

        Between two measured numbers of rows lie two more, in equal steps of the logarithm.

        Args:
            loss: within :attr:`range`. Where the strongest tau loses less, that one is taken.
        """
        known = [curve.at(loss) for curve in self.curves]
        stages = known[:1]
        for low, high in itertools.pairwise(known):
            for part in (1 / 3, 2 / 3):
                rows = round(_log_between(low.up_to, high.up_to, part))
                if stages[-1].up_to < rows < high.up_to:
                    tau = float(f"{_log_between(low.tau, high.tau, part):.4g}")
                    most = (
                        round(_between(*m, part)) for m in zip(low.most, high.most, strict=True)
                    )
                    stages.append(Stage(rows, tau, tuple(most)))
            stages.append(high)
        return stages


def check_layers_of(strengths: Mapping[str, Strength], layers: int, path: Path) -> None:
    """Refuse what was measured on another number of layers than the artifact has.

    Raises:
        ArtifactError: names both numbers.
    """
    for rule, strength in strengths.items():
        found = len(strength.curves[0].most[0])
        if found != layers:
            raise ArtifactError(
                f"{path}: its strengths of rule {rule!r} are of {found} layers, it has {layers}; "
                "run `sere-ray strength` again"
            )


def _between(low: float, high: float, part: float) -> float:
    return low + (high - low) * part


def _log_between(low: float, high: float, part: float) -> float:
    return math.exp(_between(math.log(low), math.log(high), part))
