"""Every rule by its name, and which knobs it has."""

from typing import NamedTuple

from sere_ray.rules.interface import Rule
from sere_ray.rules.margin import margin
from sere_ray.rules.peers import lynx, oea, topk, xshare
from sere_ray.rules.sere import sere


class RuleInfo(NamedTuple):
    """A rule, and what it takes."""

    apply: Rule
    keys: tuple[str, ...]
    """Keys of a policy that only some rules have."""
    required: tuple[str, ...]
    """Of these, the ones that have no default."""
    needs_scores: bool


RULES: dict[str, RuleInfo] = {
    "sere": RuleInfo(
        sere,
        ("select_top_k", "threshold", "min_primary_experts"),
        ("select_top_k",),
        False,
    ),
    "topk": RuleInfo(topk, ("select_top_k",), ("select_top_k",), False),
    "oea": RuleInfo(oea, ("select_top_k",), ("select_top_k",), True),
    "xshare": RuleInfo(xshare, ("experts", "max_per_rank"), ("experts",), True),
    "lynx": RuleInfo(lynx, ("experts", "alpha", "base", "depth"), ("experts",), True),
    "margin": RuleInfo(
        margin,
        ("tau", "min_primary_experts", "beta", "fill", "runners_up", "balance_ranks"),
        ("tau",),
        True,
    ),
}
