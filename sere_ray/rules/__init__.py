"""The specification in plain torch: rules by name. Knows nothing of vLLM, Ray or files.

What is offered here is imported when it is asked for, and only ``registry`` does without torch: the
processes that check a policy but compute nothing read that alone.
"""

from typing import TYPE_CHECKING

from sere_ray.util.late import late

if TYPE_CHECKING:
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
__getattr__ = late(
    __name__,
    {
        **dict.fromkeys(
            ("EXACT", "PADDING", "REROUTABLE", "Choice", "Layer", "Rule"),
            "sere_ray.rules.interface",
        ),
        **dict.fromkeys(("RuleCounts", "count"), "sere_ray.rules.counts"),
        **dict.fromkeys(("RULES", "RuleInfo"), "sere_ray.rules.registry"),
        "merge_repeated": "sere_ray.rules.merging",
        "name_dropped": "sere_ray.rules.common",
        "reroute": "sere_ray.rules.sere",
    },
)
