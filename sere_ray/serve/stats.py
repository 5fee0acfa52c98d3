"""Totals of the counters of all ranks."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

STEP_KINDS = ("decode_only", "mixed")
_OF_GANG = ("experts_before", "experts_after", "critical_kept")
"""Per layer. Under a global union these are the same on all ranks of a gang; so is ``steps``."""
_OF_RANK = "slots_rerouted"
"""Per layer; each rank counts its own."""


def totals(replicas: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over ranks and gangs, by kind of step.

    Args:
        replicas: with ``gang`` and ``counters`` of an engine (None: it did not answer).

    Returns:
        ``layers``, and for each of ``STEP_KINDS``: ``steps`` (of all gangs), ``decode_rows``,
        ``forward_seconds`` (None where not timed), and per layer, summed over steps,
        ``experts_before``, ``experts_after``, ``critical_kept`` and ``slots_rerouted``.
    """
    gangs: dict[str, list[Mapping[str, Any]]] = {}
    for replica in replicas:
        if replica["counters"] is not None:
            gangs.setdefault(replica["gang"], []).append(replica["counters"])
    layers: list[int] = next((ranks[0]["layers"] for ranks in gangs.values()), [])
    return {
        "layers": layers,
        **{
            kind: _add((_of_gang(ranks, kind) for ranks in gangs.values()), len(layers))
            for kind in STEP_KINDS
        },
    }


def difference(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What was counted between two totals; the later one where an engine restarted meanwhile."""
    result: dict[str, Any] = {"layers": now["layers"]}
    for kind in STEP_KINDS:
        new, old = now[kind], before[kind]
        result[kind] = new if new["steps"] < old["steps"] else _minus(new, old)
    return result


def _of_gang(ranks: list[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    counted = [counters[kind] for counters in ranks]
    shared = max if ranks[0]["policy"]["union"] == "global" else sum
    seconds = [c["forward_seconds"] for c in counted if c["forward_seconds"] is not None]
    return {
        "steps": max(c["steps"] for c in counted),
        "decode_rows": sum(c["decode_rows"] for c in counted),
        "forward_seconds": sum(seconds) / len(seconds) if seconds else None,
        **{name: _by_layer(shared, [c[name] for c in counted]) for name in _OF_GANG},
        _OF_RANK: _by_layer(sum, [c[_OF_RANK] for c in counted]),
    }


def _by_layer(combine: Callable[[Iterable[int]], int], lists: list[list[int]]) -> list[int]:
    return [combine(values) for values in zip(*lists, strict=True)]


def _add(parts: Iterable[Mapping[str, Any]], layers: int) -> dict[str, Any]:
    sums: dict[str, Any] = {
        "steps": 0,
        "decode_rows": 0,
        "forward_seconds": None,
        **{name: [0] * layers for name in (*_OF_GANG, _OF_RANK)},
    }
    for part in parts:
        for name, value in part.items():
            if isinstance(value, list):
                sums[name] = _by_layer(sum, [sums[name], value])
            elif value is not None:
                sums[name] = (sums[name] or 0) + value
    return sums


def _minus(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in new.items():
        if isinstance(value, list):
            earlier = old[name] or [0] * len(value)
            result[name] = [a - b for a, b in zip(value, earlier, strict=True)]
        else:
            result[name] = None if value is None else value - (old[name] or 0)
    return result
