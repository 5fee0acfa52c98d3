"""What a task loses as a power of how far its own answers are from the exact model's.

A small loss drowns in noise: hundreds of items may win as many as they lose. KL of the very rows
that give the answers is much better known there. So the strong settings of a task say what KL
costs, and KL of the light ones what they lose.
"""

from typing import NamedTuple

import numpy as np

from sere_ray.evaluation.task_rows import Rows

_LEAST_RIGHT = 100
"""Items that the exact model must have right for a task to say something."""
_POWERS = np.linspace(0.4, 1.0, 13)
"""Answers that flip both ways alike cost in proportion to KL; where nearly all are right, they flip
one way, in proportion to its root. Nothing costs less than in proportion: a fit that says so is of
few items, and would promise too much."""
LEAST_KL = 1e-9


class PowerLaw(NamedTuple):
    """What a task loses: ``factor x KL ^ power``."""

    factor: float
    power: float

    def at(self, kl: float) -> float:
        """The relative loss."""
        return float(min(self.factor * kl**self.power, 1.0))


def fit(rows: Rows) -> dict[str, PowerLaw]:
    """By task what it loses; without tasks that say nothing, or lose nothing.

    Args:
        rows: with ``task``, ``kl``, ``lost``, ``won``, ``right_exact``.
    """
    laws = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [r for r in rows if r["task"] == task and r["right_exact"] >= _LEAST_RIGHT]
        law = _fitted(of_task) if of_task else None
        if law is not None:
            laws[task] = law
    return laws


def nothing_stands_out(rule: str) -> str:
    """The message where :func:`fit` found nothing."""
    return (
        f"{rule}: no task lost anything that stands out; give a higher --most-items, or more text; "
        f"each must have {_LEAST_RIGHT} items right by the exact model"
    )


def _fitted(rows: Rows) -> PowerLaw | None:
    """Weighted least squares; a loss that does not stand out from its noise is none."""
    right = np.array([row["right_exact"] for row in rows], dtype=np.float64)
    loss = np.array([row["lost"] - row["won"] for row in rows]) / right
    noise = np.sqrt(np.array([row["lost"] + row["won"] for row in rows]) + 1) / right
    if (loss / noise).max() < 2:  # standard errors; all rows are of the same items
        return None
    kl = np.array([max(row["kl"], LEAST_KL) for row in rows])
    best: tuple[float, PowerLaw] | None = None
    for power in _POWERS:
        x, y = kl**power / noise, loss / noise
        factor = float(x @ y / (x @ x))
        misfit = float(np.sum((y - factor * x) ** 2))
        if factor > 0 and (best is None or misfit < best[0]):
            best = misfit, PowerLaw(factor, float(power))
    return best[1] if best else None
