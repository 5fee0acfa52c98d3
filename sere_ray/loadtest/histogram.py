"""A histogram of times with the same relative error everywhere, which adds up over processes."""

import math
from collections.abc import Iterable
from typing import Self

SMALLEST = 1e-6
"""Seconds; what is shorter counts as this."""
GROWTH = 1.005
"""Each bin ends at this times its start: 0.005 ms wide at 1 ms, 0.5 ms at 100 ms."""
_LOG_GROWTH = math.log(GROWTH)


class Histogram:
    """Counts in log-spaced bins; a quantile is off by at most 0.25 %."""

    def __init__(self) -> None:
        self._bins: dict[int, int] = {}

    def record(self, seconds: float) -> None:
        """Count one time."""
        number = int(math.log(max(seconds, SMALLEST) / SMALLEST) / _LOG_GROWTH)
        self._bins[number] = self._bins.get(number, 0) + 1

    def extend(self, times: Iterable[float]) -> Self:
        """Count many, in seconds."""
        for seconds in times:
            self.record(seconds)
        return self

    def merge(self, other: "Histogram") -> None:
        """Add what another process counted."""
        for number, count in other._bins.items():
            self._bins[number] = self._bins.get(number, 0) + count

    @property
    def count(self) -> int:
        """How many were recorded."""
        return sum(self._bins.values())

    def quantile(self, share: float) -> float:
        """The time, in seconds, that ``share`` of all are not longer than; NaN if there are none.

        It is the nearest-rank quantile of the recorded times, rounded to the middle of its bin.
        """
        rank = max(math.ceil(share * self.count), 1)
        seen = 0
        for number in sorted(self._bins):
            seen += self._bins[number]
            if seen >= rank:
                return SMALLEST * math.exp((number + 0.5) * _LOG_GROWTH)
        return math.nan

    def to_dict(self) -> dict[str, int]:
        """The counts as JSON, for a message to another process."""
        return {str(number): count for number, count in self._bins.items()}

    @classmethod
    def from_dict(cls, bins: dict[str, int]) -> "Histogram":
        """The histogram that :meth:`to_dict` wrote."""
        histogram = cls()
        histogram._bins = {int(number): int(count) for number, count in bins.items()}
        return histogram
