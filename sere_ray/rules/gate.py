"""What a gate ranks experts by: scores, a selection bias, groups.

A score is a softmax, a sigmoid or the square root of a softplus of the logit (DeepSeek-V2, -V3,
-V4). Weights come from scores. Where the gate has a selection bias, it ranks by score plus bias;
only differences of a bias matter. Where it has groups of experts, a row chooses inside some of
them: here those that its chosen experts are in.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]
SCORINGS: tuple[Scoring, ...] = get_args(Scoring)
SCORE_UNIT = 2**22
"""Of a row's scores, which are integers before they are added up: 2^22 is its best choice's."""
MOST = 2**28
"""What a score or a bias is at most in these units, either way; further is no further."""
NEVER = -(2**31)
"""Rank of an expert that a row may not choose."""


@dataclass(frozen=True)
class Gate:
    """How a gate of a layer chooses.

    Attributes:
        scoring: what makes scores of logits.
        bias: ``[E]`` float32 of what the gate adds to a score before it ranks; None = nothing.
        group_size: experts of a group, neighbours; 0 = a row may choose any.
    """

    scoring: Scoring = "softmax"
    bias: Tensor | None = None
    group_size: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether experts are ranked by a softmax and nothing else."""
        return self.scoring == "softmax" and self.bias is None and self.group_size == 0


PLAIN = Gate()
"""Of Qwen3, Mixtral, OLMoE, gpt-oss; weights from the K chosen logits alone are the same."""


def scores_of(logits: Tensor, gate: Gate) -> Tensor:
    """``[..., E]`` float32, at least 0, of logits of the same shape."""
    logits = logits.float()
    if gate.scoring == "softmax":
        # On a CPU torch's own wakes all threads for a few rows, and waits for the last of them.
        exponentials = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        return exponentials / exponentials.sum(dim=-1, keepdim=True)
    if gate.scoring == "sigmoid":
        return logits.sigmoid()
    return torch.nn.functional.softplus(logits).sqrt()


class Units(NamedTuple):
    """Of a row's experts, in units of 2^-22 of the best score that it chose, ``[..., T, E]``."""

    scores: Tensor
    """int64."""
    ranks: Tensor
    """int64, what the gate ranks by; ``NEVER`` where a row may not choose."""


def in_units(scores: Tensor, chosen: Tensor, gate: Gate) -> Units:
    """Scores and ranks as integers: the same bits on every device that has the same scores.

    The sum of a softmax is taken over integers, so that its scores may have any common factor.

    Args:
        scores: ``[..., T, E]`` float32, at least 0.
        chosen: ``[..., T, K]`` int64, of every row valid ids.
        gate: of the layer.
    """
    best = scores.gather(-1, chosen).amax(dim=-1, keepdim=True)
    scale = torch.full_like(best, SCORE_UNIT) / best
    of_scores = units = _units(scores, scale)
    if gate.bias is not None:
        if gate.scoring == "softmax":
            scale = units.sum(dim=-1, keepdim=True).float()
        units = units + _units(gate.bias.to(scores.device), scale)
    if gate.group_size:
        group = torch.arange(scores.shape[-1], device=scores.device) // gate.group_size
        num_groups = -(-scores.shape[-1] // gate.group_size)
        chosen_from = torch.nn.functional.one_hot(chosen // gate.group_size, num_groups).any(dim=-2)
        units = units.masked_fill(~chosen_from[..., group], NEVER)
    return Units(of_scores, units)


def _units(values: Tensor, scale: Tensor) -> Tensor:
    units = (values * scale).nan_to_num(nan=0.0, posinf=MOST, neginf=-MOST)
    return units.clamp(-MOST, MOST).round().long()
