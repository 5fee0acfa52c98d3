"""What the gates of a model in memory rank experts by: guessed, then held to what they chose."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedConfig

from sere_ray.rules.gate import NEVER, SCORE_UNIT, SCORINGS, Gate, in_units, scores_of
from sere_ray.util.errors import UnsupportedError

_NEAR = 1e-3
"""Scores are computed once more here: so much of the row's best one may differ by rounding."""
_NEAR_SHARE = 1e-2
"""The same of a choice's share of its row's weights."""


def candidates(config: PreTrainedConfig, bias: Tensor | None, num_experts: int) -> list[Gate]:
    """Gates that a model of this configuration may have.

    Args:
        config: of the text model.
        bias: what the gate adds to scores before it ranks, E numbers; None = nothing.
        num_experts: E.
    """
    groups, top_groups = getattr(config, "n_group", None), getattr(config, "topk_group", None)
    sizes = [0]
    if groups and top_groups and top_groups < groups < num_experts:
        sizes.append(num_experts // groups)
    if bias is not None:
        bias = bias.detach().float().flatten()
        bias = bias - bias.max()
    return [Gate(scoring, bias, size) for scoring in SCORINGS for size in sizes]


def that_chose(
    gates: Sequence[Gate], logits: Tensor, ids: Tensor, weights: Tensor, layer: int
) -> Gate:
    """The first gate by which rows chose their K best, and weighed them.

    Args:
        gates: of :func:`candidates`.
        logits: ``[..., T, E]``.
        ids: ``[..., T, K]``.
        weights: ``[..., T, K]``, in any scale.
        layer: decoder layer index.

    Raises:
        UnsupportedError: none of them.
    """
    chosen, shares = ids.long(), weights / weights.sum(dim=-1, keepdim=True)
    for gate in gates:
        scores = scores_of(logits, gate)
        ranks = in_units(scores, chosen, gate).ranks
        least = ranks.gather(-1, chosen).amin(dim=-1)
        best_other = ranks.scatter(-1, chosen, NEVER).amax(dim=-1)
        of_chosen = scores.gather(-1, chosen)
        differ = (of_chosen / of_chosen.sum(dim=-1, keepdim=True) - shares).abs().amax()
        if bool((best_other <= least + _NEAR * SCORE_UNIT).all() and differ < _NEAR_SHARE):
            return gate
    raise UnsupportedError(
        f"layer {layer}: this model's gate does not choose the K best of a softmax, a sigmoid or a "
        "square root of a softplus, with or without a bias and groups; leave out the rules that "
        "read scores"
    )
