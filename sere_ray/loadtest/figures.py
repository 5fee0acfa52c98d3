"""The figures of a report, computed from what became of every request.

A load of ours keeps every request (:class:`Sample`). Locust's workers only count
(:class:`Collector`), and the master adds up what they counted.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sere_ray.assets import final_answer
from sere_ray.loadtest.client import Outcome
from sere_ray.loadtest.driver import Load
from sere_ray.loadtest.histogram import Histogram
from sere_ray.loadtest.slo import Price, Slo

PERCENTILES = (50, 90, 99)
_TIMES = ("ttft", "itl", "tpot", "latency", "lag")
_COUNTS = ("requests", "failures", "good", "output_tokens", "good_tokens", "unfinished")


@dataclass
class Sample:
    """Measured requests of one or more blocks, as arrays; times in milliseconds."""

    seconds: float
    ttft: np.ndarray
    tpot: np.ndarray
    latency: np.ndarray
    gaps: Histogram
    tokens: float
    """Output tokens that came in the measured part, whosever they were."""
    good_tokens: float
    """Output tokens of requests that kept the SLO.

    Closed loop: ``tokens``, times the share that good requests have in the tokens of all measured
    requests. So it does not matter which answers begin before or end after the measured part.
    Open loop: the tokens of the good requests, whenever they came. All policies are sent the same
    requests, so two that keep up cost the same, although a slower one still answers some requests
    after the measured part."""
    good: int
    """Requests that kept the SLO."""
    requests: int
    failures: Counter[str]
    right: int
    checkable: int
    prompt_tokens: int
    cached_tokens: int | None
    lag: Histogram

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second."""
        return self.tokens / self.seconds

    @property
    def good_tokens_per_s(self) -> float:
        """Output tokens per second, of requests that kept the SLO."""
        return self.good_tokens / self.seconds


def sample(load: Load, slo: Slo) -> Sample:
    """The measured part of a load."""
    measured = load.measured
    answered = [o for o in measured if o.error is None]
    good = [o for o in answered if slo.kept_by(o)]
    came = sum(_tokens_between(o, load.begin, load.end) for o in load.outcomes)
    all_tokens = sum(o.output_tokens for o in measured)
    good_tokens = float(sum(o.output_tokens for o in good))
    if not load.is_open:
        good_tokens = came * good_tokens / all_tokens if all_tokens else 0.0
    known = [o for o in answered if o.cached_tokens is not None]
    return Sample(
        seconds=load.end - load.begin,
        ttft=_ms([o.ttft for o in answered]),
        tpot=_ms([o.tpot for o in answered if o.tpot is not None]),
        latency=_ms([o.latency for o in answered]),
        gaps=Histogram().extend(gap for o in answered for gap in o.gaps),
        tokens=came,
        good_tokens=good_tokens,
        good=len(good),
        requests=len(measured),
        failures=Counter(o.error for o in measured if o.error is not None),
        right=sum(final_answer(o.text) == o.label for o in answered if o.label is not None),
        checkable=sum(o.label is not None for o in answered),
        prompt_tokens=sum(o.prompt_tokens or 0 for o in known),
        cached_tokens=sum(o.cached_tokens or 0 for o in known) if known else None,
        lag=load.lag,
    )


def pool(samples: Sequence[Sample]) -> Sample:
    """Several blocks as one."""
    gaps, lag, failures = Histogram(), Histogram(), Counter[str]()
    for one in samples:
        gaps.merge(one.gaps)
        lag.merge(one.lag)
        failures += one.failures
    cached = [one.cached_tokens for one in samples if one.cached_tokens is not None]
    return Sample(
        ttft=np.concatenate([one.ttft for one in samples]),
        tpot=np.concatenate([one.tpot for one in samples]),
        latency=np.concatenate([one.latency for one in samples]),
        gaps=gaps,
        lag=lag,
        failures=failures,
        cached_tokens=sum(cached) if cached else None,
        **{name: sum(getattr(one, name) for one in samples) for name in _SUMS},
    )


_SUMS = (
    "seconds",
    "tokens",
    "good",
    "good_tokens",
    "requests",
    "right",
    "checkable",
    "prompt_tokens",
)


def figures(one: Sample, price: Price | None) -> dict[str, Any]:
    """The fields of a row of the result file; a field without a value is None."""
    row: dict[str, Any] = {"requests": one.requests, "failures": sum(one.failures.values())}
    if one.failures:
        row["failure_kinds"] = dict(one.failures.most_common(5))
    for name in ("ttft", "tpot", "latency"):
        for percent in PERCENTILES:
            row[f"{name}_ms_p{percent}"] = percentile(getattr(one, name), percent)
    for percent in PERCENTILES:
        row[f"itl_ms_p{percent}"] = rounded(one.gaps.quantile(percent / 100) * 1e3)
    row["tokens_per_s"] = rounded(one.tokens_per_s)
    row["requests_per_s"] = rounded(one.requests / one.seconds)
    row["goodput"] = rounded(one.good / one.seconds)
    row["slo_kept"] = rounded(one.good / one.requests) if one.requests else None
    row["tokens_per_s_under_slo"] = rounded(one.good_tokens_per_s)
    if price is not None:
        row["usd_per_million_output_tokens"] = rounded(price.usd_per_million(one.good_tokens_per_s))
    row["answers_right"] = rounded(one.right / one.checkable) if one.checkable else None
    row["prefix_cache_hit_rate"] = (
        None
        if one.cached_tokens is None or not one.prompt_tokens
        else rounded(one.cached_tokens / one.prompt_tokens)
    )
    row["generator_lag_ms_p99"] = rounded(one.lag.quantile(0.99) * 1e3)
    return row


class Collector:
    """Counts and histograms of one process of Locust.

    The bins are our own, since Locust rounds to whole milliseconds and more.

    Args:
        slo: what a request must keep to be good.
    """

    def __init__(self, slo: Slo) -> None:
        self._slo = slo
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._times = {name: Histogram() for name in _TIMES}
        self._counts = dict.fromkeys(_COUNTS, 0)

    def record(self, outcome: Outcome) -> None:
        """Count a request."""
        self._counts["requests"] += 1
        if outcome.error is not None:
            self._counts["failures"] += 1
            return
        self._times["ttft"].record(outcome.ttft)
        self._times["latency"].record(outcome.latency)
        self._times["itl"].extend(outcome.gaps)
        if outcome.tpot is not None:
            self._times["tpot"].record(outcome.tpot)
        good = self._slo.kept_by(outcome)
        self._counts["good"] += good
        self._counts["output_tokens"] += outcome.output_tokens
        self._counts["good_tokens"] += outcome.output_tokens * good

    def record_unfinished(self) -> None:
        """Count a request that the end of the test cut off; it is in no other figure."""
        self._counts["unfinished"] += 1

    def record_lag(self, seconds: float) -> None:
        """Count a lateness of the event loop."""
        self._times["lag"].record(seconds)

    def take(self) -> dict[str, Any]:
        """What was counted since the last call, as a message to the master."""
        message = {
            "counts": self._counts,
            "times": {name: times.to_dict() for name, times in self._times.items()},
        }
        self.clear()
        return message

    def add(self, message: dict[str, Any]) -> None:
        """Add a worker's message."""
        for name in _COUNTS:
            self._counts[name] += message["counts"][name]
        for name in _TIMES:
            self._times[name].merge(Histogram.from_dict(message["times"][name]))

    def figures(self, seconds: float) -> dict[str, Any]:
        """Counts, rates over ``seconds``, and percentiles in milliseconds."""
        counts, requests = self._counts, self._counts["requests"]
        found: dict[str, Any] = {
            **counts,
            "seconds": rounded(seconds),
            "tokens_per_s": rounded(counts["output_tokens"] / seconds),
            "goodput": rounded(counts["good"] / seconds),
            "slo_kept": rounded(counts["good"] / requests) if requests else None,
        }
        for name, times in self._times.items():
            for percent in PERCENTILES:
                found[f"{name}_ms_p{percent}"] = rounded(times.quantile(percent / 100) * 1e3)
        return found


def percentile(values: np.ndarray, percent: float) -> float | None:
    """Linear between neighbours, as numpy and ``vllm bench serve`` do; None of nothing."""
    return rounded(float(np.percentile(values, percent))) if len(values) else None


def rounded(value: float | None) -> float | None:
    """Four significant digits."""
    if value is None or math.isnan(value):
        return None
    return float(f"{value:.4g}")


def _ms(seconds: list[float]) -> np.ndarray:
    return np.array(seconds) * 1e3


def _tokens_between(outcome: Outcome, begin: float, end: float) -> float:
    """Output tokens of a request that came in an interval; each event has an equal share."""
    if not outcome.times:
        return 0.0
    inside = sum(begin <= time < end for time in outcome.times)
    return outcome.output_tokens * inside / len(outcome.times)
