"""The specification in plain torch. Knows nothing of vLLM, Ray or files."""

from sere_ray.rules.local_rank import NO_RANK, LocalRanks, reroute_local
from sere_ray.rules.sere import (
    EXACT,
    PADDING,
    REROUTABLE,
    RuleCounts,
    count,
    reroute,
)

__all__ = [
    "EXACT",
    "NO_RANK",
    "PADDING",
    "REROUTABLE",
    "LocalRanks",
    "RuleCounts",
    "count",
    "reroute",
    "reroute_local",
]
