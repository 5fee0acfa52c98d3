"""What a gate ranks a row by, as scalar loops: :func:`sere_ray.rules.gate.in_units`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from sere_ray.rules.gate import MOST, NEVER, SCORE_UNIT

compile_loop = njit(cache=True, nogil=True, error_model="numpy")
"""Division by 0 is infinite, as in torch."""
_MOST, _SCORE_UNIT = np.float32(MOST), np.float32(SCORE_UNIT)


def _to_units(value: Any, scale: Any) -> Any:
    scaled = value * scale
    if scaled != scaled:
        return 0
    return np.int64(np.rint(min(max(scaled, -_MOST), _MOST)))


to_units: Callable[..., Any] = compile_loop(_to_units)


def _rank_row(
    scores: Any, ids: Any, bias: Any, sums: bool, group: int, units: Any, ranks: Any
) -> None:
    """Fill ``units`` and ``ranks`` of a row: :func:`sere_ray.rules.gate.in_units`."""
    num_experts = len(scores)
    best = np.float32(-np.inf)
    for expert in ids:
        if scores[expert] > best or scores[expert] != scores[expert]:
            best = scores[expert]
    scale = _SCORE_UNIT / best
    total = 0
    for expert in range(num_experts):
        units[expert] = ranks[expert] = to_units(scores[expert], scale)
        total += units[expert]
    if len(bias):
        if sums:
            scale = np.float32(total)
        for expert in range(num_experts):
            ranks[expert] += to_units(bias[expert], scale)
    if group:
        for first in range(0, num_experts, group):
            is_chosen = False
            for expert in ids:
                is_chosen |= expert // group * group == first
            if not is_chosen:
                ranks[first : first + group] = NEVER


rank_row: Callable[..., None] = compile_loop(_rank_row)
