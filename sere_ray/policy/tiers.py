"""Quality tiers: how a request asks for exact routing.

A request carries its tier as ``vllm_xargs: {"sere_tier": "exact"}``, which vLLM hands to the engine
as ``SamplingParams.extra_args``; the served application also takes the header ``x-sere-tier``.
"""

from typing import Any, Literal, get_args

Tier = Literal["default", "exact"]
TIERS: tuple[Tier, ...] = get_args(Tier)
XARG = "sere_tier"
"""Key of ``vllm_xargs``."""
HEADER = "x-sere-tier"
"""HTTP header with the same meaning; it wins over the body."""


def asks_exact(sampling_params: Any) -> bool:
    """Whether a request with these ``SamplingParams`` (None for pooling) is never re-routed."""
    extra_args = getattr(sampling_params, "extra_args", None) or {}
    return bool(extra_args.get(XARG) == "exact")
