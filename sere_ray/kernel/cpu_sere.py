"""The same rule for decode steps on a CPU: scalar loops, compiled by numba.

The reference is some dozens of small torch calls. Between expert layers that stream gigabytes
through the caches, each of them starts cold. These loops are one call and touch little code.
They are two where expert-parallel ranks take the minimum of what the first returns.
`tests/kernel/test_cpu_sere.py` and `tests/rules/test_union.py` hold both to the same integers.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.rules.sere import UNNAMED, check_slots


class StepCounts(NamedTuple):
    """Fields of :class:`sere_ray.rules.RuleCounts` as plain numbers, and more."""

    experts_before: int
    experts_after: int
    slots_rerouted: int
    critical_kept: int
    slots_merged: int
    """Slots that others of their row took over: see :func:`merge_repeated`."""
    beyond_range: int
    """1 where more demand is given up than in any step of calibration, of rules with demand."""
    experts_max_rank_before: int
    """Experts before the rule of the rank that holds most of them."""
    experts_max_rank_after: int
    """The same after it."""
    slots_masked: int = 0
    """Slots that learned masks left out before the rule."""


def reroute_and_count(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    row_kind: Tensor,
    *,
    select_top_k: int,
    threshold: float | None,
    min_primary_experts: int,
    owner: Tensor | None = None,
) -> tuple[Tensor, StepCounts]:
    """Apply the rule and count; arguments as for :func:`sere_ray.reroute`, all on the CPU.

    ``owner``, the rank that holds each expert, ``[E]`` int64, is only counted with; None = one rank
    holds them all.

    Returns:
        ``[T, K]`` new tensor of the dtype of ``topk_ids``, and what changed.
    """
    check_slots(topk_ids.shape[1])
    new_ids = topk_ids.clone(memory_format=torch.contiguous_format)
    counts = _loops().reroute(
        new_ids.numpy(),
        as_numpy(topk_weights),
        similarity.contiguous().numpy(),
        row_kind.contiguous().numpy(),
        *_numbers(topk_ids, similarity, select_top_k, threshold, min_primary_experts),
        owners(owner, similarity.shape[0]),
    )
    return new_ids, StepCounts(*counts)


def lowest_slot_orders(
    topk_ids: Tensor, topk_weights: Tensor, row_kind: Tensor, num_experts: int
) -> Tensor:
    """Steps 1 and 2 for these rows; equals :func:`sere_ray.rules.sere.slot_order_bytes`.

    Returns:
        ``[E]`` uint8.
    """
    check_slots(topk_ids.shape[1])
    orders = np.full(num_experts, UNNAMED, dtype=np.uint8)
    _loops().fill_slot_orders(
        topk_ids.contiguous().numpy(),
        as_numpy(topk_weights),
        row_kind.contiguous().numpy(),
        orders,
    )
    return torch.from_numpy(orders)


def reroute_by_slot_orders(
    topk_ids: Tensor,
    orders: Tensor,
    similarity: Tensor,
    row_kind: Tensor,
    *,
    select_top_k: int,
    threshold: float | None,
    min_primary_experts: int,
    owner: Tensor | None = None,
) -> tuple[Tensor, StepCounts]:
    """Steps 3 to 5 for these rows; equals ``rerouting_of_slot_orders`` and ``apply_rerouting``.

    Args:
        topk_ids: ``[T, K]``.
        orders: ``[E]`` uint8, the minimum of :func:`lowest_slot_orders` over all ranks.
        similarity: as for :func:`sere_ray.reroute`, and so are the others.
        row_kind: ``[T]`` int8.
        select_top_k: S.
        threshold: rho.
        min_primary_experts: m.
        owner: as for :func:`reroute_and_count`.

    Returns:
        New ids, and what changed: experts are those of all ranks, slots those of these rows.
    """
    new_ids = topk_ids.clone(memory_format=torch.contiguous_format)
    counts = _loops().apply_slot_orders(
        new_ids.numpy(),
        orders.numpy(),
        similarity.contiguous().numpy(),
        row_kind.contiguous().numpy(),
        *_numbers(topk_ids, similarity, select_top_k, threshold, min_primary_experts),
        owners(owner, similarity.shape[0]),
    )
    return new_ids, StepCounts(*counts)


def merge_repeated(
    topk_ids: Tensor, topk_weights: Tensor, row_kind: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, int]:
    """Step 7 for these rows; equals :func:`sere_ray.rules.merge_repeated`.

    Args:
        topk_ids: ``[T, K]`` after a rule.
        topk_weights: ``[T, K]`` before it.
        row_kind: ``[T]`` int8.
        num_experts: E.

    Returns:
        New ids and weights, and how many slots were taken over by others.
    """
    new_ids = topk_ids.clone(memory_format=torch.contiguous_format)
    new_weights = torch.from_numpy(as_numpy(topk_weights).copy())
    kinds = row_kind.contiguous().numpy()
    merged = _loops().merge_repeated(new_ids.numpy(), new_weights.numpy(), kinds, num_experts)
    return new_ids, new_weights.to(topk_weights.dtype), merged


@functools.cache
def _loops() -> ModuleType:
    from sere_ray.kernel import cpu_loops

    return cpu_loops


def as_numpy(weights: Tensor) -> NDArray[np.floating]:
    """Weights as loops take them, float32 or float64 and contiguous; a copy only if need be."""
    if weights.dtype not in (torch.float32, torch.float64):
        weights = weights.float()  # exact: numpy has no bf16
    array: NDArray[np.floating] = weights.contiguous().numpy()
    return array


def owners(owner: Tensor | None, num_experts: int) -> NDArray[np.int64]:
    """``[E]``: the rank that holds each expert; None = one rank holds them all."""
    if owner is None:
        return np.zeros(num_experts, np.int64)
    ranks: NDArray[np.int64] = owner.numpy()
    return ranks


def _numbers(
    topk_ids: Tensor,
    similarity: Tensor,
    select_top_k: int,
    threshold: float | None,
    min_primary_experts: int,
) -> tuple[int, np.float32, int]:
    """S, rho and m as the loops take them."""
    num_slots, num_experts = topk_ids.shape[1], similarity.shape[0]
    return (
        select_top_k if 0 < select_top_k < num_slots else num_slots,
        np.float32(-np.inf if threshold is None else threshold),
        min(max(min_primary_experts, 0), num_experts),
    )
