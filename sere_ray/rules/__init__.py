"""The specification in plain torch. Knows nothing of vLLM, Ray or files."""

from sere_ray.rules.sere import (
    EXACT,
    PADDING,
    REROUTABLE,
    RuleCounts,
    count,
    reroute,
)

__all__ = ["EXACT", "PADDING", "REROUTABLE", "RuleCounts", "count", "reroute"]
