"""Figures of a run of Locust, collected in every worker and added up in the master."""

from typing import Any

from sere_ray.loadtest.client import Outcome
from sere_ray.loadtest.figures import PERCENTILES, rounded
from sere_ray.loadtest.histogram import Histogram
from sere_ray.loadtest.slo import Slo

TIMES = ("ttft", "itl", "tpot", "latency", "lag")
_COUNTS = ("requests", "failures", "good", "output_tokens", "good_tokens", "unfinished")


class Collector:
    """Histograms in own bins, since Locust rounds to whole milliseconds and more.

    Args:
        slo: what a request must keep to be good.
    """

    def __init__(self, slo: Slo) -> None:
        self._slo = slo
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._times = {name: Histogram() for name in TIMES}
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
        for name in TIMES:
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
