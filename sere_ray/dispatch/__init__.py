"""All-to-all dispatch of rows to the ranks that hold their experts; torch alone, no vLLM."""

from sere_ray.dispatch.all_to_all import AllToAll, Arrived, Sent
from sere_ray.dispatch.counts import DISPATCH_COUNTS, mean_report
from sere_ray.dispatch.missing_ranks import Greeting, MissingRankError, naming_missing_ranks

__all__ = [
    "DISPATCH_COUNTS",
    "AllToAll",
    "Arrived",
    "Greeting",
    "MissingRankError",
    "Sent",
    "mean_report",
    "naming_missing_ranks",
]
