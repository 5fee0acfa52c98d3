"""What a request may say of its quality: how it asks for exact routing, and forbids to be scored.

A request carries its tier as ``vllm_xargs: {"sere_tier": "exact"}``, which vLLM hands to the engine
as ``SamplingParams.extra_args``; the served application also takes the header ``x-sere-tier``. In
the same place it carries ``"sere_score": "never"``: its answer is not scored (docs/operate.md).
"""

from typing import Any, Literal, get_args

Tier = Literal["default", "exact"]
TIERS: tuple[Tier, ...] = get_args(Tier)
XARG = "sere_tier"
"""Key of ``vllm_xargs``."""
HEADER = "x-sere-tier"
"""HTTP header with the same meaning; it wins over the body."""
SCORE_XARG = "sere_score"
"""Key of ``vllm_xargs`` that forbids to score an answer."""
NEVER = "never"
"""Its only value."""


def asks_exact(sampling_params: Any) -> bool:
    """Whether a request with these ``SamplingParams`` (None for pooling) is never re-routed."""
    extra_args = getattr(sampling_params, "extra_args", None) or {}
    return bool(extra_args.get(XARG) == "exact")


def forbids_score(sampling_params: Any) -> bool:
    """Whether the answer to a request with these ``SamplingParams`` must not be scored."""
    extra_args = getattr(sampling_params, "extra_args", None) or {}
    return SCORE_XARG in extra_args
