"""Totals of the counters of all ranks, and what they mean per step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, Field

from sere_ray.observe.score import ScoreTotals, scores_of, total_scores
from sere_ray.util.token_times import BUCKETS, RATIO, SHORTEST_SECONDS, quantile_ms

STEP_KINDS = ("decode_only", "mixed")
_OF_GANG = (
    "experts_before",
    "experts_after",
    "experts_max_rank_before",
    "experts_max_rank_after",
    "critical_kept",
    "beyond_range",
)
"""Counted by layer. Under a global union all ranks of a gang count the same, steps included."""
_OF_RANK = (
    "slots_rerouted",
    "slots_merged",
    "slots_masked",
    "bytes_dispatched_before",
    "bytes_dispatched_after",
)
"""Counted by layer. Each rank counts its own, so a gang has their sum."""
_ROWS = ("rows", "decode_rows")
"""Each rank counts its own, so a gang has their sum."""
ByLayer = list[int]


class StepSums(BaseModel):
    """Sums over the steps of one kind, over all ranks and gangs; lists are by layer.

    Steps without a row that may be re-routed are not counted. ``before`` is what the gate's choice
    makes of a step, ``after`` what the rule makes of it (in mode ``observe``: would make).
    """

    steps: int = Field(description="forward passes, of all gangs")
    steps_counted: int = Field(
        description="of these, under the modes on and observe: only they count experts and slots"
    )
    rows: int = Field(description="rows computed: decode rows, and rows of prompts and exact tier")
    decode_rows: int = Field(description="rows that may be re-routed")
    slots: int = Field(description="expert choices of decode rows: decode_rows x K x layers")
    forward_seconds: float | None = Field(description="of forward passes; null on a GPU: not timed")
    experts_before: ByLayer = Field(description="distinct experts named by a row of the gang")
    experts_after: ByLayer = Field(description="distinct experts read")
    experts_max_rank_before: ByLayer | None = Field(
        description="experts on the rank that holds most of those; null where no rank knows "
        "(union: local; GPU ranks that do not gather ids)"
    )
    experts_max_rank_after: ByLayer | None = Field(
        description="experts read on the rank that reads most; null where no rank knows"
    )
    critical_kept: ByLayer = Field(
        description="experts read outside the primary set: no stand-in reaches the threshold"
    )
    beyond_range: ByLayer = Field(
        description="steps that gave up more demand than any step that `loss` was measured on; "
        "under `guard` the layer stayed exact in them"
    )
    slots_rerouted: ByLayer = Field(description="expert choices that the rule changed")
    slots_merged: ByLayer = Field(
        description="of these, choices that another one of their row took over, as it names the "
        "same expert: computed and sent once"
    )
    slots_masked: ByLayer = Field(
        description="expert choices that learned masks left out, before the rule; they are not "
        "among slots_rerouted"
    )
    bytes_dispatched_before: ByLayer | None = Field(
        description="rows sent to experts of other ranks, without the way back, had the rule "
        "changed nothing; null on GPUs: vLLM sends inside captured graphs"
    )
    bytes_dispatched_after: ByLayer | None = Field(
        description="rows sent to experts of other ranks, without the way back; null on GPUs. An "
        "all-gather sends the same whatever the rule does"
    )


class Totals(BaseModel):
    """Sums by kind of step."""

    layers: list[int] = Field(description="decoder layers, in the order of every list by layer")
    decode_only: StepSums = Field(description="steps in which every row may be re-routed")
    mixed: StepSums = Field(description="steps that also compute prompts or exact requests")
    token_times: list[int] = Field(
        description="output tokens by the time per output token of their request in that second, "
        f"in the engine: bucket i holds those up to {SHORTEST_SECONDS} s x {RATIO}^i"
    )
    scores: ScoreTotals = Field(
        description="of answers that the exact model scored; since the start of each engine, also "
        "where other counters are of an interval"
    )


class StepMeans(BaseModel):
    """Means of :class:`StepSums`: per step, and for experts per layer and counted step. Null where
    nothing was counted."""

    rows: float | None = Field(description="batch size: rows of a gang in a step")
    decode_rows: float | None = Field(description="of these, rows that may be re-routed")
    step_ms: float | None = Field(description="forward pass, milliseconds; null on a GPU")
    experts_before: float | None
    experts_after: float | None
    experts_max_rank_before: float | None
    experts_max_rank_after: float | None
    critical_kept: float | None
    beyond_range: float | None = Field(description="share of a layer's steps, 0..1")
    rerouted_share: float | None = Field(description="slots_rerouted of slots, 0..1")
    bytes_dispatched_before: float | None = Field(description="of a step, over all layers")
    bytes_dispatched_after: float | None


def totals(replicas: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over ranks and gangs, by kind of step: fields of :class:`Totals`.

    Args:
        replicas: with ``gang`` and ``counters`` of an engine (None: it did not answer).
    """
    gangs: dict[str, list[Mapping[str, Any]]] = {}
    for replica in replicas:
        if replica["counters"] is not None:
            gangs.setdefault(replica["gang"], []).append(replica["counters"])
    layers: list[int] = next((ranks[0]["layers"] for ranks in gangs.values()), [])
    times = [counters["token_times"] for ranks in gangs.values() for counters in ranks]
    return {
        "layers": layers,
        "token_times": _by_layer(sum, [[0] * BUCKETS, *times]),
        "scores": total_scores(c.get("scores") for ranks in gangs.values() for c in ranks),
        **{
            kind: _add([_of_gang(ranks, kind) for ranks in gangs.values()], len(layers))
            for kind in STEP_KINDS
        },
    }


def summary(replicas: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Totals and what they mean: ``total``, ``decode_only_means``, ``mixed_means``,
    ``tpot_p90_ms`` and ``scores`` of ``GET /sere/stats``.

    Args:
        replicas: as for :func:`totals`.
    """
    total = totals(replicas)
    return {
        "total": total,
        "decode_only_means": means(total["decode_only"]),
        "mixed_means": means(total["mixed"]),
        "tpot_p90_ms": quantile_ms(total["token_times"], 0.9),
        "scores": scores_of(total["scores"]),
    }


def since(
    replicas: Iterable[Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What each rank counted between two times, for :func:`totals`.

    Ranks that do not answer now are left out, and those without earlier counters: a rank that was
    restarted has a new name.

    Args:
        replicas: each with ``replica`` and ``counters`` of its engine (None: it did not answer).
        before: earlier counters, from :func:`by_replica`.
    """
    return [
        {**r, "counters": _minus(r["counters"], before[r["replica"]])}
        for r in replicas
        if r["counters"] is not None and r["replica"] in before
    ]


def by_replica(replicas: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Counters of the replicas that answered, by name."""
    return {r["replica"]: r["counters"] for r in replicas if r["counters"] is not None}


def between(last: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Totals of what was counted between two answers of ``GET /sere/stats``, by the ranks that
    answered both times."""
    return totals(since(now["per_replica"], by_replica(last["per_replica"])))


def means(sums: Mapping[str, Any]) -> dict[str, float | None]:
    """Fields of :class:`StepMeans`.

    Args:
        sums: of one kind of step, from :func:`totals`.
    """
    steps, layers = sums["steps"], len(sums["experts_before"])
    seconds = sums["forward_seconds"]
    return {
        **{name: _share(sums[name], steps) for name in _ROWS},
        "step_ms": None if seconds is None else _share(1e3 * seconds, steps),
        **{name: _share(_sum(sums[name]), sums["steps_counted"] * layers) for name in _OF_GANG},
        "rerouted_share": _share(sum(sums["slots_rerouted"]), sums["slots"]),
        **{name: _share(_sum(sums[name]), steps) for name in _OF_RANK if name.startswith("bytes")},
    }


def _of_gang(ranks: list[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    counted = [counters[kind] for counters in ranks]
    shared = max if ranks[0]["policy"]["union"] == "global" else sum
    seconds = [c["forward_seconds"] for c in counted if c["forward_seconds"] is not None]
    decode_rows = sum(c["decode_rows"] for c in counted)
    return {
        "steps": max(c["steps"] for c in counted),
        "steps_counted": max(c["steps_counted"] for c in counted),
        "rows": sum(c["rows"] for c in counted),
        "decode_rows": decode_rows,
        "slots": decode_rows * ranks[0]["top_k"] * len(ranks[0]["layers"]),
        "forward_seconds": sum(seconds) / len(seconds) if seconds else None,
        **{name: _by_layer(shared, [c[name] for c in counted]) for name in _OF_GANG},
        **{name: _by_layer(sum, [c[name] for c in counted]) for name in _OF_RANK},
    }


def _by_layer(
    combine: Callable[[Iterable[int]], int], lists: list[ByLayer | None]
) -> ByLayer | None:
    """None where one of them does not know."""
    known = [values for values in lists if values is not None]
    if len(known) < len(lists):
        return None
    return [combine(values) for values in zip(*known, strict=True)]


def _add(parts: list[dict[str, Any]], layers: int) -> dict[str, Any]:
    if not parts:
        numbers = dict.fromkeys(("steps", "steps_counted", *_ROWS, "slots"), 0)
        lists = {name: [0] * layers for name in (*_OF_GANG, *_OF_RANK)}
        return {**numbers, "forward_seconds": None, **lists}
    sums: dict[str, Any] = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if name == "forward_seconds":  # None: no such step in that gang yet
            known = [value for value in values if value is not None]
            sums[name] = sum(known) if known else None
        else:
            is_number = isinstance(first, int)
            sums[name] = sum(values) if is_number else _by_layer(sum, values)
    return sums


def _minus(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """All that is counted, less what was counted before; the rest (layers, policy, scores, which
    are few) as it is."""
    result = {**new, "token_times": _less(new["token_times"], old["token_times"])}
    for kind in STEP_KINDS:
        counted = {k: v for k, v in new[kind].items() if not isinstance(v, dict)}
        result[kind] = {name: _less(value, old[kind][name]) for name, value in counted.items()}
    return result


def _less(new: Any, old: Any) -> Any:
    """A number, or a list of them, less the earlier; None stays, and was zero."""
    if isinstance(new, list):
        return [a - b for a, b in zip(new, old or [0] * len(new), strict=True)]
    return None if new is None else new - (old or 0)


def _sum(values: ByLayer | None) -> int | None:
    return None if values is None else sum(values)


def _share(part: float | None, whole: float) -> float | None:
    return None if part is None or not whole else part / whole
