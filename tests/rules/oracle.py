"""The rule once more, from the specification's text alone: lists, sets and loops.

Slow and plain on purpose. Shares no line with the package, so that a misreading has to be made
twice to go unseen. Numbers come in as Python lists (a float32 is exact as a Python float).
"""

import struct
from dataclasses import dataclass

PADDING, REROUTABLE, EXACT = 0, 1, 2


@dataclass(frozen=True)
class Outcome:
    """What the rule yields for one layer and step."""

    ids: list[list[int]]
    primary: set[int]
    experts_before: int
    experts_after: int
    slots_rerouted: int
    critical_kept: int


def float32(value: float) -> float:
    """Round to float32 once, ties to even; beyond the largest float32 to infinity."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def ranked_slots(ids: list[int], weights: list[float], num_experts: int) -> list[int]:
    """Step 1: valid slots by weight, descending, equal weights by slot order; invalid last."""
    valid = [slot for slot, e in enumerate(ids) if 0 <= e < num_experts]
    invalid = [slot for slot, e in enumerate(ids) if not 0 <= e < num_experts]
    ranked: list[int] = []
    while valid:
        best = valid[0]
        for slot in valid:
            if weights[slot] > weights[best]:
                best = slot
        ranked.append(best)
        valid.remove(best)
    return ranked + invalid


def most_similar(row: list[float], candidates: list[int]) -> int:
    """The candidate with the largest similarity, the lowest index on ties."""
    best = min(candidates)
    for v in sorted(candidates):
        if row[v] > row[best]:
            best = v
    return best


def reroute(
    ids: list[list[int]],
    weights: list[list[float]],
    similarity: list[list[float]],
    *,
    num_slots: int,
    row_kind: list[int] | None = None,
    select_top_k: int,
    threshold: float | None = None,
    min_primary_experts: int = 0,
) -> Outcome:
    """Steps 1 to 6. ``num_slots`` is K: lists of no rows do not know it.

    Where the specification is silent: with S <= 0 or S >= K, P is P_K; a re-routed slot is one
    whose id changed, in any row.
    """
    num_experts = len(similarity)
    kinds = [REROUTABLE] * len(ids) if row_kind is None else row_kind
    is_identity = select_top_k <= 0 or select_top_k >= num_slots

    # Steps 1 and 2: P_s for every s.
    union: list[set[int]] = [set() for _ in range(num_slots + 1)]
    for row, row_weights, kind in zip(ids, weights, kinds, strict=True):
        if kind == EXACT:
            for s in range(num_slots + 1):
                union[s].update(e for e in row if 0 <= e < num_experts)
        elif kind == REROUTABLE:
            ranked = ranked_slots(row, row_weights, num_experts)
            for s in range(num_slots + 1):
                union[s].update(row[slot] for slot in ranked[:s] if 0 <= row[slot] < num_experts)

    # Step 3: the floor.
    effective = num_slots
    if not is_identity:
        effective = select_top_k
        while len(union[effective]) < min(min_primary_experts, len(union[num_slots])):
            effective += 1
    primary = union[effective]

    # Steps 4 to 6, slot by slot.
    rho = None if threshold is None else float32(threshold)
    p = sorted(primary)
    memory: dict[tuple[bool, int], int] = {}

    def new_id(u: int, kind: int) -> int:
        if is_identity or kind != REROUTABLE or u in primary or not p:
            return u
        v = most_similar(similarity[u], p)
        return u if rho is not None and similarity[u][v] < rho else v

    new: list[list[int]] = []
    for row, kind in zip(ids, kinds, strict=True):
        new_row = []
        for u in row:
            if not 0 <= u < num_experts:
                new_row.append(u)
                continue
            key = (kind == REROUTABLE, u)
            if key not in memory:
                memory[key] = new_id(u, kind)
            new_row.append(memory[key])
        new.append(new_row)

    def read(table: list[list[int]]) -> set[int]:
        rows = [row for row, kind in zip(table, kinds, strict=True) if kind != PADDING]
        return {e for row in rows for e in row if 0 <= e < num_experts}

    return Outcome(
        ids=new,
        primary=primary,
        experts_before=len(read(ids)),
        experts_after=len(read(new)),
        slots_rerouted=sum(
            a != b
            for x, y, kind in zip(ids, new, kinds, strict=True)
            if kind != PADDING
            for a, b in zip(x, y, strict=True)
        ),
        critical_kept=len(read(new) - primary),
    )


def merge(
    ids: list[list[int]], weights: list[list[float]], kinds: list[int], num_experts: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Step 7, of rows after the rule; weights are float32 numbers."""
    new_ids, new_weights = [list(row) for row in ids], [list(row) for row in weights]
    for row, row_weights, kind in zip(new_ids, new_weights, kinds, strict=True):
        if kind != REROUTABLE:
            continue
        best_first = ranked_slots(row, row_weights, num_experts)
        for expert in {e for e in row if 0 <= e < num_experts}:
            of_expert = [slot for slot, e in enumerate(row) if e == expert]
            if len(of_expert) == 1:
                continue
            total = 0.0
            for slot in of_expert:
                total = float32(total + float32(row_weights[slot]))
            best = next(slot for slot in best_first if slot in of_expert)
            for slot in of_expert:
                row[slot], row_weights[slot] = -1, 0.0
            row[best], row_weights[best] = expert, total
    return new_ids, new_weights


def published(
    ids: list[list[int]],
    similarity: list[list[float]],
    *,
    select_top_k: int,
    threshold: float | None = None,
) -> list[list[int]]:
    """The rule as its authors' code has it: sorted slots, valid ids, every row, no floor.

    Their threshold 0 means none.
    """
    primary = {e for row in ids for e in row[:select_top_k]}
    new = [list(row) for row in ids]
    for row in new:
        for slot in range(select_top_k, len(row)):
            u = row[slot]
            if u in primary:
                continue
            v = most_similar(similarity[u], sorted(primary))
            if threshold and similarity[u][v] < float32(threshold):
                continue
            row[slot] = v
    return new
