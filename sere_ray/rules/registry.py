"""Every rule by its name, and which knobs it has."""

from typing import NamedTuple

from sere_ray.rules.exfold import exfold
from sere_ray.rules.interface import Output, Rule
from sere_ray.rules.margin import margin
from sere_ray.rules.mone import mone, novices
from sere_ray.rules.none import none
from sere_ray.rules.peers import lynx, oea, topk, xshare
from sere_ray.rules.sere import sere
from sere_ray.rules.skipping import ace, k1k2
from sere_ray.rules.spare import spare


class RuleInfo(NamedTuple):
    """A rule, and what it takes."""

    apply: Rule
    keys: tuple[str, ...]
    """Keys of a policy that only some rules have."""
    required: tuple[str, ...]
    """Of these, the ones that have no default."""
    needs_scores: bool
    statistics: tuple[str, ...] = ()
    """Names of :attr:`~sere_ray.rules.interface.Layer.statistics` that it reads."""
    output: Output | None = None
    any_gate: bool = False
    """Whether it reads scores of other gates than a softmax, too: :attr:`Layer.gate`."""
    needs_similarity: bool = False
    """Whether it reads :attr:`Layer.similarity`."""
    after_masks: bool = False
    """Whether learned masks may come before it: :mod:`sere_ray.masks.compose`."""


RULES: dict[str, RuleInfo] = {
    "none": RuleInfo(none, (), (), False, after_masks=True),
    "sere": RuleInfo(
        sere,
        ("select_top_k", "threshold", "min_primary_experts"),
        ("select_top_k",),
        False,
        needs_similarity=True,
        after_masks=True,
    ),
    "topk": RuleInfo(topk, ("select_top_k",), ("select_top_k",), False),
    "oea": RuleInfo(oea, ("select_top_k",), ("select_top_k",), True),
    "xshare": RuleInfo(xshare, ("experts", "max_per_rank"), ("experts",), True),
    "lynx": RuleInfo(lynx, ("experts", "alpha", "base", "depth"), ("experts",), True),
    "k1k2": RuleInfo(
        k1k2, ("select_top_k", "normalise_over"), ("select_top_k", "normalise_over"), True
    ),
    "ace": RuleInfo(ace, ("tau", "rcr_scale"), ("tau",), False, ("ace_gsp", "ace_rcr")),
    "exfold": RuleInfo(
        exfold,
        ("experts",),
        ("experts",),
        False,
        ("output_norm", "stand_in_scale", "stand_in_loss"),
    ),
    "mone": RuleInfo(
        mone, ("experts",), ("experts",), False, ("novice_score", "output_mean"), novices
    ),
    "margin": RuleInfo(
        margin,
        (
            "tau",
            "loss",
            "guard",
            "min_primary_experts",
            "beta",
            "fill",
            "runners_up",
            "balance_ranks",
        ),
        ("tau",),
        True,
        any_gate=True,
        after_masks=True,
    ),
    "spare": RuleInfo(
        spare,
        ("tau", "loss", "guard", "min_primary_experts", "runners_up", "lead", "limit", "protect"),
        ("tau",),
        True,
        ("directed_scale", "directed_loss"),
        any_gate=True,
        after_masks=True,
    ),
}

RULES_AFTER_MASKS = tuple(name for name, rule in RULES.items() if rule.after_masks)
"""Rules that learned masks go with."""
