"""Gates of every kind, and what they choose: as vLLM's routers do, in a few lines of torch."""

import torch
from torch import Tensor

from sere_ray.rules.gate import Gate, scores_of


def make_gate(scoring: str, *, experts: int, bias: float = 0.0, groups: int = 1, seed: int = 0):
    """A gate whose bias is spread so far around 3: only differences of it matter."""
    generator = torch.Generator().manual_seed(seed)
    values = 3 + bias * torch.randn(experts, generator=generator) if bias else None
    return Gate(scoring, values, experts // groups if groups > 1 else 0)


def choose(logits: Tensor, gate: Gate, *, slots: int, top_groups: int) -> tuple[Tensor, Tensor]:
    """``[T, K]`` ids, best first, and scores as weights; ``top_groups`` groups a row."""
    scores = scores_of(logits, gate)
    ranking = scores if gate.bias is None else scores + gate.bias
    if gate.group_size:
        of_group = ranking.unflatten(1, (-1, gate.group_size))
        count = 1 if gate.bias is None else min(2, gate.group_size)
        best = of_group.topk(count, dim=2).values.sum(dim=2).topk(top_groups, dim=1).indices
        allowed = torch.zeros(of_group.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        ranking = ranking.masked_fill(
            ~allowed.repeat_interleave(gate.group_size, dim=1), -torch.inf
        )
    ids = ranking.sort(dim=1, descending=True, stable=True).indices[:, :slots]
    return ids, scores.gather(1, ids)
