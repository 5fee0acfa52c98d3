"""The same rule for decode steps on a CPU: scalar loops, compiled by numba.

At 16 rows the reference is 35 small torch calls. Between expert layers that stream gigabytes
through the caches, each of them starts cold. These loops are one call and touch little code.
`tests/rules` holds both to the same integers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sere_ray.rules.sere import EXACT, PADDING


class StepCounts(NamedTuple):
    """Fields of :class:`sere_ray.rules.RuleCounts` as plain numbers."""

    experts_before: int
    experts_after: int
    slots_rerouted: int
    critical_kept: int


def reroute_and_count(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    row_kind: Tensor,
    *,
    select_top_k: int,
    threshold: float | None,
    min_primary_experts: int,
) -> tuple[Tensor, StepCounts]:
    """Apply the rule and count; arguments as for :func:`sere_ray.reroute`, all on the CPU.

    Returns:
        ``[T, K]`` new tensor of the dtype of ``topk_ids``, and what changed.
    """
    num_slots, num_experts = topk_ids.shape[1], similarity.shape[0]
    if topk_weights.dtype not in (torch.float32, torch.float64):
        topk_weights = topk_weights.float()  # exact: numpy has no bf16
    new_ids = topk_ids.clone(memory_format=torch.contiguous_format)
    counts = _compiled()(
        new_ids.numpy(),
        topk_weights.contiguous().numpy(),
        similarity.contiguous().numpy(),
        row_kind.contiguous().numpy(),
        select_top_k if 0 < select_top_k < num_slots else num_slots,
        np.float32(-np.inf if threshold is None else threshold),
        min(max(min_primary_experts, 0), num_experts),
    )
    return new_ids, StepCounts(*counts)


@functools.cache
def _compiled() -> Callable[..., tuple[int, int, int, int]]:
    """The loops as machine code; cached on disk for the next process."""
    from numba import njit  # here and not above: it takes half a second to import

    compiled: Callable[..., tuple[int, int, int, int]] = njit(cache=True, nogil=True)(_reroute)
    return compiled


def _reroute(
    ids: Any, weights: Any, similarity: Any, kinds: Any, select_top_k: int, rho: Any, floor: int
) -> tuple[int, int, int, int]:
    """Change ``ids`` in place; steps 1 to 4 of the specification."""
    (num_rows, num_slots), num_experts = ids.shape, similarity.shape[0]

    lowest_rank = np.full(num_experts, num_slots)
    for row in range(num_rows):
        if kinds[row] == PADDING:
            continue
        for slot in range(num_slots):
            expert = ids[row, slot]
            if expert < 0 or expert >= num_experts:
                continue
            rank = 0
            if kinds[row] != EXACT:
                for other in range(num_slots):
                    if ids[row, other] < 0 or ids[row, other] >= num_experts:
                        continue
                    ahead = weights[row, other] > weights[row, slot]
                    tied = weights[row, other] == weights[row, slot] and other < slot
                    rank += ahead or tied
            lowest_rank[expert] = min(lowest_rank[expert], rank)

    size_of = np.zeros(num_slots + 1, np.int64)  # size_of[s] = |P_s|
    for expert in range(num_experts):
        for size in range(lowest_rank[expert] + 1, num_slots + 1):
            size_of[size] += 1
    size = select_top_k
    while size_of[size] < min(floor, size_of[num_slots]):
        size += 1

    target = np.arange(num_experts)
    named = size_of[num_slots]
    moved = 0
    for expert in range(num_experts):
        if not size <= lowest_rank[expert] < num_slots:
            continue
        stand_in = -1
        for primary in range(num_experts):
            if lowest_rank[primary] < size and (
                stand_in < 0 or similarity[expert, primary] > similarity[expert, stand_in]
            ):
                stand_in = primary
        if stand_in >= 0 and similarity[expert, stand_in] >= rho:
            target[expert] = stand_in
            moved += 1

    slots_rerouted = 0
    for row in range(num_rows):
        if kinds[row] == PADDING:
            continue
        for slot in range(num_slots):
            expert = ids[row, slot]
            if 0 <= expert < num_experts and target[expert] != expert:
                ids[row, slot] = target[expert]
                slots_rerouted += 1
    return named, named - moved, slots_rerouted, named - moved - size_of[size]
