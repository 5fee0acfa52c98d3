"""The specification in plain torch: rules by name. Knows nothing of vLLM, Ray or files."""

from sere_ray.rules.common import name_dropped
from sere_ray.rules.counts import RuleCounts, count
from sere_ray.rules.interface import EXACT, PADDING, REROUTABLE, Choice, Layer, Rule
from sere_ray.rules.merging import merge_repeated
from sere_ray.rules.registry import RULES, RuleInfo
from sere_ray.rules.sere import reroute

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
    "merge_repeated",
    "name_dropped",
    "reroute",
]
