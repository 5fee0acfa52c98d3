"""Step time from experts read: a line through what `sere-ray bench step-time` measured."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sere_ray.util.errors import SereError
from sere_ray.util.results import load_result

_LEAST_POINTS = 3


@dataclass(frozen=True)
class StepCurve:
    """Milliseconds of a decode step of one model on one GPU, at one batch size."""

    model: str
    gpu: str
    batch: int
    """Rows of a step that were measured: the nearest to those asked for."""
    experts_exact: float
    """Experts of a layer that exact steps read there."""
    base_ms: float
    per_expert_ms: float

    def speedup(self, share: float) -> float:
        """Of a step that reads this share of what exact ones read, 0..1, to an exact one."""
        return self._ms(1.0) / self._ms(share)

    def _ms(self, share: float) -> float:
        return self.base_ms + self.per_expert_ms * share * self.experts_exact


def read_curve(path: Path, batch: int) -> StepCurve:
    """The curve of the batch size nearest to ``batch``; of several models the first.

    Raises:
        SereError: no such file, or too few rows of a re-routed engine.
    """
    document = load_result(path)
    rows = [row for row in document.get("rows", []) if {"arm", "step_ms"} <= row.keys()]
    if not rows:
        raise SereError(f"--step-times = {path}: no result of `sere-ray bench step-time`")
    model = rows[0]["model"]
    # Those of an engine with the key: stock's own launches differ.
    own = [row for row in rows if row["model"] == model and row["mode"] is not None]
    nearest = min({row["batch"] for row in own}, key=lambda size: abs(size - batch), default=0)
    router = next((row["router"] for row in own if row["batch"] == nearest), None)
    chosen = [row for row in own if row["batch"] == nearest and row["router"] == router]
    if len({row["experts_read"] for row in chosen}) < _LEAST_POINTS:
        raise SereError(
            f"--step-times = {path}: has fewer than {_LEAST_POINTS} numbers of experts read at "
            f"{nearest} rows; measure with --arms off,S=K,S=2,S=1 and others"
        )
    reads = np.array([row["experts_read"] for row in chosen])
    slope, base = np.polyfit(reads, [row["step_ms"] for row in chosen], 1)
    gpu = document.get("machine", {}).get("gpu", "CPU")
    return StepCurve(model, gpu, nearest, float(reads.max()), float(base), float(slope))
