"""Scalar loops of the rule, compiled by numba and cached on disk for the next process.

A module of its own, which :mod:`sere_ray.kernel.cpu_sere` imports when it is first called: numba
takes half a second to import.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from sere_ray.rules import EXACT, PADDING, REROUTABLE
from sere_ray.rules.merging import DROPPED
from sere_ray.rules.sere import UNNAMED

Counts = tuple[int, int, int, int, int, int, int, int]


def _fill_slot_orders(ids: Any, weights: Any, kinds: Any, orders: Any) -> None:
    """Lower ``orders``; steps 1 and 2 of the specification."""
    (num_rows, num_slots), num_experts = ids.shape, orders.shape[0]
    for row in range(num_rows):
        if kinds[row] == PADDING:
            continue
        for slot in range(num_slots):
            expert = ids[row, slot]
            if expert < 0 or expert >= num_experts:
                continue
            order = 0
            if kinds[row] != EXACT:
                for other in range(num_slots):
                    if ids[row, other] < 0 or ids[row, other] >= num_experts:
                        continue
                    ahead = weights[row, other] > weights[row, slot]
                    tied = weights[row, other] == weights[row, slot] and other < slot
                    order += ahead or tied
            if order < orders[expert]:
                orders[expert] = order


fill_slot_orders: Callable[..., None] = njit(cache=True, nogil=True)(_fill_slot_orders)


def _find_targets(
    orders: Any, similarity: Any, num_slots: int, select_top_k: int, rho: Any, floor: int
) -> tuple[Any, Any, tuple[int, int, int]]:
    """Steps 3 and 4 per expert.

    Returns:
        Where each expert goes, the lowest slot order of each, and the counts of experts.
    """
    num_experts = similarity.shape[0]
    lowest = np.minimum(orders, num_slots)
    size_of = np.zeros(num_slots + 1, np.int64)  # size_of[s] = |P_s|
    for expert in range(num_experts):
        for size in range(lowest[expert] + 1, num_slots + 1):
            size_of[size] += 1
    size = select_top_k
    while size_of[size] < min(floor, size_of[num_slots]):
        size += 1

    target = np.arange(num_experts)
    named = size_of[num_slots]
    moved = 0
    for expert in range(num_experts):
        if not size <= lowest[expert] < num_slots:
            continue
        stand_in = -1
        for primary in range(num_experts):
            if lowest[primary] < size and (
                stand_in < 0 or similarity[expert, primary] > similarity[expert, stand_in]
            ):
                stand_in = primary
        if stand_in >= 0 and similarity[expert, stand_in] >= rho:
            target[expert] = stand_in
            moved += 1
    return target, lowest, (named, named - moved, named - moved - size_of[size])


find_targets: Callable[..., Any] = njit(cache=True, nogil=True)(_find_targets)


def _busiest(target: Any, lowest: Any, num_slots: int, owner: Any) -> tuple[int, int]:
    """Experts that the rank which reads most reads, before and after the rule."""
    before = np.zeros(owner.max() + 1, np.int64)
    after = np.zeros_like(before)
    for expert in range(len(owner)):
        if lowest[expert] < num_slots:
            before[owner[expert]] += 1
            after[owner[expert]] += target[expert] == expert
    return before.max(), after.max()


busiest: Callable[..., tuple[int, int]] = njit(cache=True, nogil=True)(_busiest)


def _apply_slot_orders(
    ids: Any,
    orders: Any,
    similarity: Any,
    kinds: Any,
    select_top_k: int,
    rho: Any,
    floor: int,
    owner: Any,
) -> Counts:
    """Change ``ids`` in place; steps 3 to 5 of the specification."""
    (num_rows, num_slots), num_experts = ids.shape, similarity.shape[0]
    target, lowest, (named, read, critical) = find_targets(
        orders, similarity, num_slots, select_top_k, rho, floor
    )
    slots_rerouted = 0
    for row in range(num_rows):
        if kinds[row] == PADDING:
            continue
        for slot in range(num_slots):
            expert = ids[row, slot]
            if 0 <= expert < num_experts and target[expert] != expert:
                ids[row, slot] = target[expert]
                slots_rerouted += 1
    most_before, most_after = busiest(target, lowest, num_slots, owner)
    return named, read, slots_rerouted, critical, 0, 0, most_before, most_after


apply_slot_orders: Callable[..., Counts] = njit(cache=True, nogil=True)(_apply_slot_orders)


def _reroute(
    ids: Any,
    weights: Any,
    similarity: Any,
    kinds: Any,
    select_top_k: int,
    rho: Any,
    floor: int,
    owner: Any,
) -> Counts:
    """``fill_slot_orders`` and ``apply_slot_orders``, where nothing comes between them."""
    orders = np.full(similarity.shape[0], UNNAMED, np.uint8)
    fill_slot_orders(ids, weights, kinds, orders)
    return apply_slot_orders(ids, orders, similarity, kinds, select_top_k, rho, floor, owner)


reroute: Callable[..., Counts] = njit(cache=True, nogil=True)(_reroute)


def _merge_repeated(ids: Any, weights: Any, kinds: Any, num_experts: int) -> int:
    """Change ``ids`` and ``weights`` in place; step 7 of the specification.

    Returns:
        How many slots were taken over by others.
    """
    num_rows, num_slots = ids.shape
    merged = 0
    for row in range(num_rows):
        if kinds[row] != REROUTABLE:
            continue
        for slot in range(num_slots):
            expert = ids[row, slot]
            if expert < 0 or expert >= num_experts:
                continue
            best, total, count = slot, np.float32(0), 0
            for other in range(slot, num_slots):
                if ids[row, other] == expert:
                    count += 1
                    total += np.float32(weights[row, other])
                    if weights[row, other] > weights[row, best]:
                        best = other
            if count == 1:
                continue
            for other in range(slot, num_slots):
                if ids[row, other] == expert:
                    ids[row, other] = DROPPED
                    weights[row, other] = 0
            # Written last: the loop above has cleared this slot, too.
            ids[row, best] = expert
            weights[row, best] = total
            merged += count - 1
    return merged


merge_repeated: Callable[..., int] = njit(cache=True, nogil=True)(_merge_repeated)
