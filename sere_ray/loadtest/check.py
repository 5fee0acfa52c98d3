"""How far the generator can be trusted: its times against those of a stub that wrote them down."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console

from sere_ray.loadtest.client import Outcome
from sere_ray.loadtest.driver import Load, LoadPlan, Target
from sere_ray.loadtest.figures import rounded
from sere_ray.loadtest.generator import Generator, generator
from sere_ray.loadtest.stub import stub, written
from sere_ray.loadtest.workload import Entry
from sere_ray.util.errors import SereError

LIMIT_MS = 1.0
"""Greatest error at p99 that still counts as measured."""
REQUIRED_RATE = 50
"""Tokens per second and stream at which the limit must hold."""
_FACTORS = (1, 2, 3, 4, 6, 8, 12, 16)
_KEEPS_UP = 0.9
"""Share of the asked rate below which the stub is the bottleneck."""


def run_check(
    save: Callable[[dict[str, Any]], None], *, streams: int, seconds: float, console: Console
) -> None:
    """Measure errors at growing rates until the limit is passed or the stub cannot follow.

    Args:
        save: called with the content of the result file.
        streams: concurrent ones.
        seconds: of each rate.
        console: where results are printed.

    Raises:
        SereError: the errors are beyond the limit at the required rate already.
    """
    with _cores() as (own, others), stub(others) as url, generator() as sender:
        rows = climb(lambda rate: _measure(sender, url, rate, streams, seconds), console)
    verdict = verdict_of(rows)
    console.print(verdict, highlight=False)
    save({"limit_ms": LIMIT_MS, "cores": [own, others], "verdict": verdict, "rows": rows})
    if not _is_good(rows[0]):
        raise SereError(f"{verdict}: too early; use an idle machine, or fewer streams")


def climb(measure: Callable[[int], dict[str, Any]], console: Console) -> list[dict[str, Any]]:
    """Rows of growing rates; the last one is beyond the limit, or the highest rate."""
    rows: list[dict[str, Any]] = []
    for factor in _FACTORS:
        rows.append(measure(factor * REQUIRED_RATE))
        console.print(_line(rows[-1]), highlight=False)
        if not _is_good(rows[-1]):
            break
    return rows


def _is_good(row: dict[str, Any]) -> bool:
    return bool(row["within_limit"] and row["stub_keeps_up"])


def _measure(
    sender: Generator, url: str, rate: int, streams: int, seconds: float
) -> dict[str, Any]:
    target = Target(f"{url}/{rate}/v1", "stub")
    # Answers of one to three seconds, so that streams do not start at the same moments.
    entries = [Entry(prompt="stub", max_tokens=rate + 2 * rate * i // 97) for i in range(97)]
    load = sender.run(LoadPlan(target, tuple(entries), seconds, warmup=3.0, streams=streams))
    ttft, gaps, tokens = _errors(load)
    achieved = tokens / streams / seconds
    row: dict[str, Any] = {
        "streams": streams,
        "tokens_per_s_per_stream": rate,
        "achieved_per_stream": rounded(achieved),
        "events_per_s": rounded(tokens / seconds),
        "requests": len(load.measured),
    }
    for name, values in (("ttft", ttft), ("itl", gaps)):
        for percent in (50, 99, 100):
            row[f"{name}_error_ms_p{percent}"] = rounded(float(np.percentile(values, percent)))
    row["generator_lag_ms_p99"] = rounded(load.lag.quantile(0.99) * 1e3)
    row["within_limit"] = max(row["ttft_error_ms_p99"], row["itl_error_ms_p99"]) < LIMIT_MS
    row["stub_keeps_up"] = achieved >= _KEEPS_UP * rate
    return row


def _errors(load: Load) -> tuple[np.ndarray, np.ndarray, int]:
    """Errors of TTFT and of gaps in ms, and tokens of the measured part."""
    ttft, gaps, tokens = [], [], 0
    for outcome in load.outcomes:
        if outcome.error is not None:
            raise SereError(f"the stub did not answer: {outcome.error}")
        received, emitted = written(outcome.text)
        tokens += sum(load.begin <= time < load.end for time in emitted)
        if load.begin <= outcome.scheduled < load.end:
            ttft.append(_ttft_error(outcome, received, emitted[0]))
            gaps.append(np.diff(outcome.times) - np.diff(emitted))
    return np.abs(ttft) * 1e3, np.abs(np.concatenate(gaps)) * 1e3, tokens


def _ttft_error(outcome: Outcome, received: float, first: float) -> float:
    """What the generator adds: the way to the stub and back, and both sides' waking up."""
    return outcome.ttft - (first - received)


@contextmanager
def _cores() -> Iterator[tuple[int | None, int | None]]:
    """Generator on one core, stub on another; None where the machine has one only."""
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        yield None, None
        return
    own, others = sorted(before)[:2]
    os.sched_setaffinity(0, {own})  # the generator's processes inherit it
    try:
        yield own, others
    finally:
        os.sched_setaffinity(0, before)


def verdict_of(rows: list[dict[str, Any]]) -> str:
    """How far the generator can be trusted, in words."""
    last = rows[-1]
    where = f"{last['streams']} streams x {last['tokens_per_s_per_stream']} tokens/s"
    if not last["within_limit"]:
        return f"{LIMIT_MS:g} ms at p99 is exceeded at {where} ({last['events_per_s']:g} events/s)"
    if not last["stub_keeps_up"]:
        return (
            f"within {LIMIT_MS:g} ms up to {where}, of which the stub gives "
            f"{last['events_per_s']:g} events/s: it, not the generator, is the limit"
        )
    return f"within {LIMIT_MS:g} ms up to {where}, the highest rate tried"


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['streams']} x {row['tokens_per_s_per_stream']} tokens/s "
        f"({row['events_per_s']:g} events/s): error at p99 "
        f"TTFT {row['ttft_error_ms_p99']:.3f} ms, ITL {row['itl_error_ms_p99']:.3f} ms; "
        f"event loop late by {row['generator_lag_ms_p99']:.2f} ms"
    )
