"""When requests arrive that do not wait for answers: Poisson or gamma, at a rate, in steps."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sere_ray.util.errors import SereError


@dataclass(frozen=True)
class Arrivals:
    """Random arrival times at a rate that may change in steps.

    Intervals are gamma-distributed with shape ``burstiness``: 1 = Poisson, smaller = burstier, as
    in ``vllm bench serve``. They are drawn with mean 1 and then stretched by the rate of the time.
    """

    steps: tuple[tuple[float, float], ...]
    """(seconds, requests per second) of each step; the last rate goes on without end."""
    burstiness: float = 1.0

    @classmethod
    def at(cls, rate: float, burstiness: float = 1.0) -> "Arrivals":
        """One rate all the time.

        Raises:
            SereError: the rate or burstiness is not positive.
        """
        return cls.checked([(1.0, rate)], burstiness)

    @classmethod
    def checked(cls, steps: Sequence[tuple[float, float]], burstiness: float) -> "Arrivals":
        """Arrivals of these steps, once the numbers have been checked.

        Raises:
            SereError: one is not positive.
        """
        if not steps or min(min(step) for step in steps) <= 0:
            raise SereError(f"{list(steps)}: seconds and rates must be greater than 0")
        if burstiness <= 0:
            raise SereError(f"burstiness = {burstiness}: must be greater than 0; 1 is Poisson")
        return cls(tuple(steps), burstiness)

    @property
    def seconds(self) -> float:
        """How long all steps take together."""
        return sum(seconds for seconds, _ in self.steps)

    def times(self, seed: int) -> Iterator[float]:
        """Seconds from the start, ascending, without end; the same for the same seed."""
        draw = random.Random(seed)
        due = 0.0  # in requests
        while True:
            due += draw.gammavariate(self.burstiness, 1 / self.burstiness)
            yield self._time_of(due)

    def _time_of(self, due: float) -> float:
        """When the integral of the rate reaches ``due``."""
        start = 0.0
        for seconds, rate in self.steps[:-1]:
            if due < seconds * rate:
                return start + due / rate
            start, due = start + seconds, due - seconds * rate
        return start + due / self.steps[-1][1]


def parse_steps(text: str) -> list[tuple[float, float]]:
    """``20x1,20x4`` = 20 s at 1 request per second, then 20 s at 4.

    Raises:
        SereError: another form.
    """
    try:
        steps = [tuple(float(part) for part in step.split("x")) for step in text.split(",")]
        return [(seconds, rate) for seconds, rate in steps]
    except ValueError:
        raise SereError(
            f"--steps = {text!r}: must be SECONDSxRATE, comma-separated, such as 20x1,20x4"
        ) from None
