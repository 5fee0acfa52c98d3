"""What a rank's time is made of: a + b x experts read, fitted to measured decode steps.

A decode step of few rows reads weights most of the time, so it takes as long as the experts of the
rank that reads the most, and what does not depend on them: attention, gates, the rows themselves,
and over several ranks what they wait for each other.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sere_ray.util.errors import SereError
from sere_ray.util.results import load_result

LEAST_POINTS = 4
"""Steps that read different numbers of experts, for a line."""
_LAYERS = re.compile(r": (\d+) layers x")


def fit_rank_times(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """A line for each model, number of ranks and of rows; experts are those of the busiest rank.

    Args:
        paths: results of `sere-ray bench step-time`.

    Returns:
        Rows: ``model``, ``ranks``, ``rows`` of a rank, ``points``, ``experts`` (least and most
        read), ``base_ms`` of a step, ``expert_us`` (b, of one layer), ``worst_error`` (a share of
        the measured step).

    Raises:
        SereError: a file is no such result, or none has enough points for a line.
    """
    points = defaultdict(list)
    for path in paths:
        for row in load_result(path).get("rows", []):
            if not {"arm", "step_ms", "experts_read", "model"} <= row.keys():
                raise SereError(f"{path}: no result of `sere-ray bench step-time`")
            # Stock's launches are other ones.
            if not row["arm"].startswith("stock"):
                rows = row.get("rows_per_rank", row.get("batch"))
                group = row["model"], row.get("data_parallel_size", 1), rows
                experts = row.get("experts_read_max_rank", row["experts_read"])
                points[group].append((experts, row["step_ms"]))
    lines = [_fit(*group, measured) for group, measured in sorted(points.items())]
    found = [line for line in lines if line is not None]
    if not found:
        raise SereError(
            f"{', '.join(map(str, paths))}: no model was measured at {LEAST_POINTS} numbers of "
            "experts read; measure with --arms off,S=K,S=2,S=1 and others"
        )
    return found


def _fit(
    model: str, ranks: int, rows: int, measured: list[tuple[float, float]]
) -> dict[str, Any] | None:
    layers = _LAYERS.search(model)
    experts, times = np.array(measured).T
    if layers is None or len(set(experts.tolist())) < LEAST_POINTS:
        return None
    slope, base = np.polyfit(experts, times, 1)
    errors = np.abs(base + slope * experts - times) / times
    return {
        "model": model,
        "ranks": ranks,
        "rows": rows,
        "points": len(measured),
        "experts": [float(experts.min()), float(experts.max())],
        "base_ms": round(float(base), 2),
        "expert_us": round(1e3 * float(slope) / int(layers[1]), 2),
        "worst_error": round(float(errors.max()), 3),
    }
