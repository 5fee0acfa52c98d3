"""Scalar loops of the rule ``margin``, compiled by numba and cached on disk for the next process.

A module of its own, as :mod:`sere_ray.kernel.cpu_loops` is. Names and order of operations are those
of :mod:`sere_ray.rules.margin` and :func:`sere_ray.rules.common.refill`: float32 wherever they are,
so that ids, demand and weights have the same bits.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from sere_ray.kernel.gate_loops import compile_loop, rank_row
from sere_ray.rules import PADDING, REROUTABLE
from sere_ray.rules.gate import NEVER
from sere_ray.rules.margin import FIRST, UNIT, WEIGHT_UNIT

_UNIT = np.float32(UNIT)
_OWN = 2**31
"""What puts an expert that a row chose before all others."""


def _is_changeable(ids: Any, kind: int, num_experts: int) -> bool:
    """Of a row: re-routable, without a sentinel."""
    valid = kind == REROUTABLE
    for expert in ids:
        valid &= 0 <= expert < num_experts
    return valid


is_changeable: Callable[..., bool] = compile_loop(_is_changeable)


def _best_others(ranks: Any, is_chosen: Any, best: Any) -> tuple[int, int]:
    """How many of a row's unchosen experts are compared with, at most ``len(best)``; their sum."""
    found = 0
    for expert in range(len(ranks)):
        rank = ranks[expert]
        if is_chosen[expert] or rank == NEVER:
            continue
        if found == len(best):
            if found == 0 or rank <= best[found - 1]:
                continue
            found -= 1
        place = found
        while place > 0 and best[place - 1] < rank:
            best[place] = best[place - 1]
            place -= 1
        best[place] = rank
        found += 1
    return found, best[:found].sum()


best_others: Callable[..., tuple[int, int]] = compile_loop(_best_others)


def _ask(
    ids: Any,
    weights: Any,
    scores: Any,
    kinds: Any,
    row_weight: Any,
    bias: Any,
    sums: bool,
    group: int,
    runners_up: int,
    drops_first: bool,
    demand: Any,
    anyway: Any,
    named: Any,
) -> None:
    """Fill ``demand``, ``anyway`` (kept whatever the demand) and ``named`` (by anybody)."""
    (num_rows, num_slots), num_experts = ids.shape, scores.shape[1]
    units, ranks = np.empty(num_experts, np.int64), np.empty(num_experts, np.int64)
    is_chosen = np.zeros(num_experts, np.bool_)
    best = np.empty(min(runners_up, num_experts - num_slots), np.int64)
    for row in range(num_rows):
        if not is_changeable(ids[row], kinds[row], num_experts):
            if kinds[row] != PADDING:
                for expert in ids[row]:
                    if 0 <= expert < num_experts:
                        anyway[expert] = named[expert] = True
            continue
        rank_row(scores[row], ids[row], bias, sums, group, units, ranks)
        first, total = 0, 0
        for slot in range(num_slots):
            expert = ids[row, slot]
            is_chosen[expert] = named[expert] = True
            total += units[expert]
            if weights[row, slot] > weights[row, first]:
                first = slot
        if not drops_first:
            anyway[ids[row, first]] = True
        found, others = best_others(ranks, is_chosen, best)
        count = max(found, 1)
        divisor = np.float32(max(total, 1)) * np.float32(count)
        for slot in range(num_slots):
            expert = ids[row, slot]
            is_chosen[expert] = False
            ahead = np.float32(max(count * ranks[expert] - others, 0))
            lead = min(ahead / divisor, np.float32(2))
            wanted = np.int64(np.rint(lead * lead * _UNIT))
            if drops_first and slot == first:
                wanted *= FIRST
            if len(row_weight):
                wanted = wanted * row_weight[row] // WEIGHT_UNIT
            demand[expert] += wanted


ask: Callable[..., None] = compile_loop(_ask)


def _of_level(wanted: Any, owner: Any) -> Any:
    """:func:`sere_ray.rules.margin.of_level`."""
    num_experts = len(wanted)
    level, sums = np.zeros(num_experts, np.int64), np.zeros(num_experts, np.int64)
    for expert in range(num_experts):
        for other in range(num_experts):
            if owner[other] == owner[expert]:
                tied = wanted[other] == wanted[expert] and other < expert
                level[expert] += wanted[other] > wanted[expert] or tied
        sums[level[expert]] += wanted[expert]
    return sums[level]


of_level: Callable[..., Any] = compile_loop(_of_level)


def _keep(
    asked: Any, named: Any, tau: int, floor: int, balances: bool, owner: Any, most: int
) -> tuple[Any, int]:
    """``[E]`` bool, of what all rows ask for and name, and how much demand it gives up.

    Everything named is kept where the rule gives up more than ``most``.
    """
    num_experts = len(asked)
    wanted = np.minimum(asked, UNIT + 1)
    decisive = of_level(wanted, owner) if balances else wanted
    kept = named & (decisive > tau)
    missing = min(floor, named.sum()) - kept.sum()
    for _ in range(missing):
        best = -1
        for expert in range(num_experts):
            is_left = named[expert] and not kept[expert]
            if is_left and (best < 0 or wanted[expert] > wanted[best]):
                best = expert
        kept[best] = True
    given_up = 0
    for expert in range(num_experts):
        if named[expert] and not kept[expert]:
            given_up += wanted[expert]
    return named if given_up > most else kept, given_up


keep: Callable[..., tuple[Any, int]] = compile_loop(_keep)


def _power(base: Any, exponent: float) -> Any:
    """:func:`sere_ray.rules.common.power`."""
    if exponent == 0.5:
        return np.sqrt(base)
    return np.float32(np.float64(base) ** exponent)


power: Callable[..., Any] = compile_loop(_power)


def _take_best(worth: Any, takes: Any, taken: Any) -> int:
    """Fill ``taken`` with the experts of most worth, of equal ones the first; returns how many."""
    found = 0
    for expert in range(len(worth)):
        if not takes[expert]:
            continue
        if found == len(taken):
            if worth[expert] <= worth[taken[found - 1]]:
                continue
            found -= 1
        place = found
        while place > 0 and worth[taken[place - 1]] < worth[expert]:
            taken[place] = taken[place - 1]
            place -= 1
        taken[place] = expert
        found += 1
    return found


take_best: Callable[..., int] = compile_loop(_take_best)


def _refill(
    ids: Any,
    weights: Any,
    scores: Any,
    kinds: Any,
    kept: Any,
    bias: Any,
    sums: bool,
    group: int,
    is_plain: bool,
    beta: float,
    fill: Any,
) -> None:
    """Change ``ids`` and ``weights`` in place; ``fill`` is a float32."""
    (num_rows, num_slots), num_experts = ids.shape, scores.shape[1]
    units, ranks = np.empty(num_experts, np.int64), np.empty(num_experts, np.int64)
    own, takes = np.zeros(num_experts, np.bool_), np.empty(num_experts, np.bool_)
    taken, p = np.empty(num_slots, np.int64), np.empty(num_slots, np.float32)
    for row in range(num_rows):
        if not is_changeable(ids[row], kinds[row], num_experts):
            continue
        served = True
        for expert in ids[row]:
            served &= kept[expert]
        if served:
            continue
        of_row = scores[row]
        if is_plain:  # bits of floats from 0 on are in their order
            ranks[:] = of_row.view(np.int32)
        else:
            rank_row(of_row, ids[row], bias, sums, group, units, ranks)
        for expert in range(num_experts):
            takes[expert] = kept[expert] and ranks[expert] > NEVER
        before, mass = np.float32(0), np.float32(0)
        for slot in range(num_slots):
            expert = ids[row, slot]
            before += of_row[expert]
            mass += np.float32(weights[row, slot])
            if not own[expert]:
                ranks[expert] += _OWN
            own[expert] = True
        found = take_best(ranks, takes, taken)
        after = np.float32(0)
        for place in range(found):
            score = of_row[taken[place]]
            p[place] = score if own[taken[place]] else fill * score
            after += p[place]
        own[:] = False
        scale = power(after, beta) * power(before, 1 - beta)
        if after == 0:  # it shares out its weight
            p[:found], scale = 1, np.float32(found)
        for slot in range(num_slots):
            ids[row, slot] = taken[slot] if slot < found else -1
            weights[row, slot] = p[slot] * mass / scale if slot < found else 0


refill: Callable[..., None] = compile_loop(_refill)


def _finish(before: Any, ids: Any, kinds: Any, names_dropped: bool) -> tuple[int, int]:
    """Count what rows take; with ``names_dropped`` give dropped slots a name, in place.

    Returns:
        Slots whose expert the row did not have before, or that are dropped; and those dropped.
    """
    num_rows, num_slots = ids.shape
    rerouted, dropped = 0, 0
    for row in range(num_rows):
        first = ids[row, 0]
        for slot in range(num_slots - 1, -1, -1):
            if ids[row, slot] >= 0:
                first = ids[row, slot]
        if kinds[row] != PADDING:
            for slot in range(num_slots):
                stays = False
                for other in range(num_slots):
                    stays |= ids[row, slot] == before[row, other]
                rerouted += not stays
        for slot in range(num_slots):
            if ids[row, slot] < 0 and before[row, slot] >= 0:
                dropped += 1
                if names_dropped:
                    ids[row, slot] = first
    return rerouted, dropped


finish: Callable[..., tuple[int, int]] = compile_loop(_finish)


def _busiest(named: Any, owner: Any) -> Any:
    """Experts of the rank that holds most of those that are ``named``, ``[E]`` bool."""
    of_ranks = np.zeros(owner.max() + 1, np.int64)
    for expert in range(len(owner)):
        of_ranks[owner[expert]] += named[expert]
    return of_ranks.max()


busiest: Callable[..., Any] = compile_loop(_busiest)
