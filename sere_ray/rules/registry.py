"""Every rule by its name, and which knobs it has. Rules are imported when they are applied."""

from typing import TYPE_CHECKING, Any, NamedTuple

from sere_ray.util.late import find

if TYPE_CHECKING:
    from sere_ray.rules.interface import Output, Rule


class RuleInfo(NamedTuple):
    """A rule, and what it takes."""

    place: str
    """``module:function`` of it, below :mod:`sere_ray.rules`."""
    keys: tuple[str, ...]
    """Keys of a policy that only some rules have."""
    required: tuple[str, ...]
    """Of these, the ones that have no default."""
    needs_scores: bool
    statistics: tuple[str, ...] = ()
    """Names of :attr:`~sere_ray.rules.interface.Layer.statistics` that it reads."""
    output_place: str | None = None
    """The same of its :data:`~sere_ray.rules.interface.Output`, if it has one."""
    any_gate: bool = False
    """Whether it reads scores of other gates than a softmax, too: :attr:`Layer.gate`."""
    needs_similarity: bool = False
    """Whether it reads :attr:`Layer.similarity`."""
    after_masks: bool = False
    """Whether learned masks may come before it: :mod:`sere_ray.masks.compose`."""

    @property
    def apply(self) -> "Rule":
        """The rule."""
        found: Rule = _at(self.place)
        return found

    @property
    def output(self) -> "Output | None":
        """What it adds to a layer's output; None = nothing."""
        return None if self.output_place is None else _at(self.output_place)


def _at(place: str) -> Any:
    module, _, name = place.partition(":")
    return find(f"sere_ray.rules.{module}", name)


RULES: dict[str, RuleInfo] = {
    "none": RuleInfo("none:none", (), (), False, after_masks=True),
    "sere": RuleInfo(
        "sere:sere",
        ("select_top_k", "threshold", "min_primary_experts"),
        ("select_top_k",),
        False,
        needs_similarity=True,
        after_masks=True,
    ),
    "topk": RuleInfo("peers:topk", ("select_top_k",), ("select_top_k",), False),
    "oea": RuleInfo("peers:oea", ("select_top_k",), ("select_top_k",), True),
    "xshare": RuleInfo("peers:xshare", ("experts", "max_per_rank"), ("experts",), True),
    "lynx": RuleInfo("peers:lynx", ("experts", "alpha", "base", "depth"), ("experts",), True),
    "k1k2": RuleInfo(
        "skipping:k1k2",
        ("select_top_k", "normalise_over"),
        ("select_top_k", "normalise_over"),
        True,
    ),
    "ace": RuleInfo("skipping:ace", ("tau", "rcr_scale"), ("tau",), False, ("ace_gsp", "ace_rcr")),
    "exfold": RuleInfo(
        "exfold:exfold",
        ("experts",),
        ("experts",),
        False,
        ("output_norm", "stand_in_scale", "stand_in_loss"),
    ),
    "mone": RuleInfo(
        "mone:mone",
        ("experts",),
        ("experts",),
        False,
        ("novice_score", "output_mean"),
        "mone:novices",
    ),
    "margin": RuleInfo(
        "margin:margin",
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
        "spare:spare",
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
