"""The rule ``sere`` over many decode steps at once, by the compiled loops."""

import torch
from torch import Tensor

from sere_ray.kernel.cpu_sere import merge_repeated, reroute_and_count
from sere_ray.rules import REROUTABLE, Choice, Layer


def compiled_sere(ids: Tensor, weights: Tensor, layer: Layer) -> Choice:
    """``RULES["sere"]`` by the compiled loops, which tests hold to it; no other row kinds."""
    assert layer.similarity is not None
    kinds = torch.full((ids.shape[-2],), REROUTABLE, dtype=torch.int8)
    merges = 0 < layer.select_top_k < ids.shape[-1]
    choices = []
    for of_step, of_weights in zip(ids.flatten(0, -3), weights.flatten(0, -3), strict=True):
        new_ids, _ = reroute_and_count(
            of_step,
            of_weights,
            layer.similarity,
            kinds,
            select_top_k=layer.select_top_k,
            threshold=layer.threshold,
            min_primary_experts=layer.min_primary_experts,
        )
        if merges:
            new_ids, of_weights, _ = merge_repeated(new_ids, of_weights, kinds, layer.num_experts)
        choices.append((new_ids, of_weights))
    all_ids, all_weights = zip(*choices, strict=True)
    return torch.stack(all_ids).view_as(ids), torch.stack(all_weights).view_as(weights)
