"""The specification in plain torch. Knows nothing of vLLM, Ray or files."""

from sere_ray.rules.interface import Choice, Layer, Rule, name_dropped
from sere_ray.rules.registry import RULES, RuleInfo
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
    "PADDING",
    "REROUTABLE",
    "RULES",
    "Choice",
    "Layer",
    "Rule",
    "RuleCounts",
    "RuleInfo",
    "count",
    "name_dropped",
    "reroute",
]
