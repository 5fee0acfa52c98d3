"""Every rule by its name, and which knobs it has."""

from typing import NamedTuple

from torch import Tensor

from sere_ray.rules.interface import Choice, Layer, Rule
from sere_ray.rules.margin import margin
from sere_ray.rules.peers import lynx, oea, topk, xshare
from sere_ray.rules.sere_steps import reroute_steps


class RuleInfo(NamedTuple):
    """A rule, and what it takes."""

    apply: Rule
    keys: tuple[str, ...]
    """Keys of a policy that only some rules have."""
    required: tuple[str, ...]
    """Of these, the ones that have no default."""
    needs_scores: bool


def sere(
    topk_ids: Tensor, topk_weights: Tensor, scores: Tensor | None, row_kind: Tensor, layer: Layer
) -> Choice:
    """:func:`sere_ray.reroute` of every step."""
    del scores
    if layer.similarity is None:
        raise ValueError("the rule 'sere' needs the similarity of the layer, got None")
    new_ids = reroute_steps(
        topk_ids,
        topk_weights,
        layer.similarity,
        row_kind,
        select_top_k=layer.select_top_k,
        threshold=layer.threshold,
        min_primary_experts=layer.min_primary_experts,
    )
    return new_ids, topk_weights.clone()


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
