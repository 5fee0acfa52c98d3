"""Times per output token, counted in buckets. They take little room, and counts of ranks add up."""

import bisect
from collections.abc import Sequence
from itertools import accumulate

SHORTEST_SECONDS, RATIO, BUCKETS = 1e-4, 1.1, 140
"""Bucket i holds times up to ``SHORTEST_SECONDS * RATIO**i``; the last one holds all above 51 s."""
BOUNDS = [SHORTEST_SECONDS * RATIO**i for i in range(BUCKETS - 1)]
SLICE_SECONDS = 1.0
"""Length of the interval over which a request's time per output token is taken."""


def bucket_of(seconds: float) -> int:
    """Index of a time's bucket."""
    return bisect.bisect_left(BOUNDS, seconds)


def quantile_ms(counts: Sequence[int], share: float) -> float | None:
    """Milliseconds per token that this share of tokens did not exceed; None without tokens.

    It is at most 10 % off, since tokens of a bucket are taken as evenly spread over it. Times above
    51 s count as 51 s.

    Args:
        counts: ``[BUCKETS]`` tokens.
        share: above 0, up to 1.
    """
    wanted = share * sum(counts)
    if not wanted:
        return None
    below = list(accumulate(counts))
    i = bisect.bisect_left(below, wanted)
    if i == BUCKETS - 1:
        return 1e3 * BOUNDS[-1]
    low = BOUNDS[i - 1] if i else 0.0
    part = 1 - (below[i] - wanted) / counts[i]
    return 1e3 * (low + part * (BOUNDS[i] - low))
