"""The same rule for decode steps on a CPU: numpy on the tensors' own memory.

At 16 rows the reference is 35 small torch calls, whose dispatch costs more than their work. Here
only experts that must move look for a stand-in. `tests/rules` holds both to the same integers.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.rules.sere import EXACT, PADDING

Array = NDArray[Any]


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
    ids, kinds = topk_ids.numpy(), row_kind.numpy()
    valid = (ids >= 0) & (ids < num_experts) & (kinds != PADDING)[:, None]
    bins = np.where(valid, ids, num_experts)  # what names no expert goes to a bin of its own

    exact_in_numpy = topk_weights.dtype in (torch.float32, torch.float64)
    weights = (topk_weights if exact_in_numpy else topk_weights.float()).numpy()
    lowest_rank = _lowest_slot_rank(ids, bins, weights, kinds, num_experts)
    named = lowest_rank < num_slots
    size = _effective_size(lowest_rank, select_top_k, min_primary_experts, num_slots)
    primary = np.flatnonzero(lowest_rank < size)
    seeking = np.flatnonzero(named & (lowest_rank >= size))

    target = np.arange(num_experts + 1)
    moved = 0
    if len(primary) and len(seeking):
        candidates = similarity.numpy()[seeking[:, None], primary]
        best = candidates.argmax(axis=1)  # the first one, and `primary` rises: lowest index
        if threshold is not None:
            similar = candidates[np.arange(len(seeking)), best] >= np.float32(threshold)
            seeking, best = seeking[similar], best[similar]
        target[seeking] = primary[best]
        moved = len(seeking)
    new_ids = np.where(valid, target[bins], ids).astype(ids.dtype, copy=False)
    before = int(np.count_nonzero(named))
    counts = StepCounts(
        experts_before=before,
        experts_after=before - moved,
        slots_rerouted=int(np.count_nonzero(new_ids != ids)),
        critical_kept=before - moved - len(primary),
    )
    return torch.from_numpy(new_ids), counts


def _lowest_slot_rank(
    ids: Array, bins: Array, weights: Array, kinds: Array, num_experts: int
) -> NDArray[np.int64]:
    """Steps 1 and 2: ``[E]`` best rank of each expert, K where no row names it."""
    num_slots = ids.shape[1]
    by_weight = np.where((ids >= 0) & (ids < num_experts), weights, -np.inf)
    ranked = np.take_along_axis(bins, np.argsort(-by_weight, axis=1, kind="stable"), axis=1)
    lowest = np.full(num_experts + 1, num_slots)
    for rank in range(num_slots - 1, -1, -1):  # a better rank overwrites a worse one
        lowest[ranked[:, rank]] = rank
    lowest[bins[kinds == EXACT]] = 0
    return lowest[:num_experts]


def _effective_size(
    lowest_rank: NDArray[np.int64], select_top_k: int, floor: int, num_slots: int
) -> int:
    """Step 3: S_eff. ``S <= 0`` and ``S >= K`` keep every expert."""
    if not 0 < select_top_k < num_slots:
        return num_slots
    sizes = np.bincount(lowest_rank, minlength=num_slots + 1)[:num_slots].cumsum()
    too_small = int(np.count_nonzero(sizes < min(floor, int(sizes[-1]))))
    return max(select_top_k, too_small + 1)
