"""The shortest time a decode step can take: what it must read, at the speed of a plain copy."""

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from sere_ray.bench.weights import EMBEDDINGS


@dataclass(frozen=True)
class WeightBytes:
    """What a decode step reads of a model's weights."""

    per_expert: int
    """One routed expert of every MoE layer, together."""
    other: int
    """Everything but the routed experts and the input embedding, of which only rows are read."""


def count_weights(model: torch.nn.Module) -> WeightBytes:
    """Count a vLLM model whose output matrix is not its input embedding."""
    per_expert = other = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if name.rpartition(".")[2].startswith(("w13_", "w2_")):  # stacked: [E, ...]
            per_expert += size // parameter.shape[0]
        elif not name.endswith(EMBEDDINGS):
            other += size
    return WeightBytes(per_expert, other)


def mean_context(prompt: int, tokens: int) -> float:
    """Mean tokens of context over the timed steps: those that make token 3 to ``tokens`` + 2."""
    return prompt + (tokens + 3) / 2


def step_bytes(
    weights: WeightBytes, *, experts_read: float, batch: int, context: float, kv_per_token: int
) -> float:
    """Bytes that a decode step reads.

    Args:
        weights: of the model.
        experts_read: distinct routed experts, mean over the MoE layers.
        batch: rows of the step.
        context: mean tokens of context of a row.
        kv_per_token: bytes of the KV cache that belong to one token.
    """
    return experts_read * weights.per_expert + weights.other + batch * context * kv_per_token


def copy_bytes_per_s(size: int = 4 << 30, repeats: int = 10) -> float:
    """Bytes a second, read and written, of a copy within the GPU's memory; the median."""
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times: list[float] = []
    for repeat in range(repeats + 3):  # the first ones warm up
        start, end = _event(), _event()
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    del source, target
    torch.cuda.empty_cache()
    return 2 * size / statistics.median(times)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
