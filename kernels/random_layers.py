"""Random layers as a decode step finds them, for the measurements of this folder."""

import torch

from sere_ray.kernel.memory import OWN_COUNTERS, DeviceLayer, LayerTables, Settings, StepInput
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import REROUTABLE

GPU = torch.device("cuda", 0)


class RandomLayers:
    """What a gate returns for a batch in each of some layers, random similarity, and a policy.

    Attributes:
        logits: ``[layers, T, E]`` bf16, of a gate.
        ids: ``[layers, T, K]`` int32; every expert is as likely, rows are sorted by weight.
        weights: ``[layers, T, K]`` float32.
        kinds: ``[T]`` int8: every row decodes.
        layers: what a launch reads and writes, by layer.
    """

    def __init__(
        self, layers: int, rows: int, num_experts: int, top_k: int, select_top_k: int
    ) -> None:
        g = torch.Generator().manual_seed(rows)
        scores = torch.rand((layers, rows, num_experts), generator=g)
        top = scores.softmax(-1).topk(top_k, dim=-1)
        self.logits = scores.to(GPU, torch.bfloat16)
        self.ids, self.weights = top.indices.int().to(GPU), top.values.to(GPU)
        similarity = torch.rand((layers, num_experts, num_experts), generator=g)
        settings, step = Settings(GPU, layers), StepInput(rows, GPU)
        policy = BoundPolicy(
            mode="on", select_top_k=select_top_k, threshold=None, min_primary_experts=0
        )
        settings.write(policy, top_k=top_k, num_experts=num_experts)
        kinds = torch.full((rows,), REROUTABLE, dtype=torch.int8)
        step.write(kinds.numpy(), counter_row=0)
        self.kinds = kinds.to(GPU)
        self.select_top_k = select_top_k
        self.counters = torch.zeros((2, layers, OWN_COUNTERS), dtype=torch.int64, device=GPU)
        self.layers = [
            DeviceLayer(
                LayerTables.build(matrix, GPU),
                settings.buffer[layer],
                step,
                self.counters[:, layer],
            )
            for layer, matrix in enumerate(similarity)
        ]
