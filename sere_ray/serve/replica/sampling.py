"""Which requests are sampled: runs of requests that follow each other.

While one request of a batch asks for log-probabilities the engine computes them for the whole batch
in every step, so neighbours that ask as well cost little more. Single requests, evenly spread,
would have one of them in far more steps.
"""

from collections.abc import Callable

RUN = 8
"""Requests of a run."""


class Sampler:
    """Says of each request that comes whether it is sampled.

    Args:
        share: of requests that are sampled in the long run, 0..1.
        draw: a number from 0 to 1, evenly distributed.
    """

    def __init__(self, share: float, draw: Callable[[], float]) -> None:
        # A run of R and the 1/p - 1 requests before it, of which R are sampled: their share is
        # R / (R - 1 + 1/p).
        self._begins = share / (RUN - (RUN - 1) * share)
        self._draw, self._left = draw, 0

    def takes(self) -> bool:
        """Whether the next request is sampled."""
        if not self._left and self._draw() < self._begins:
            self._left = RUN
        if not self._left:
            return False
        self._left -= 1
        return True
