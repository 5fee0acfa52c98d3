"""Measure a judge through the stock transformers model: perplexity, unions, use of the experts."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cut import union
from measure import expert_counts, usage, watched_gates
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

UNION_SIZES = (4, 16, 64)
UNION_WINDOWS, UNION_LENGTH = 256, 128
"""Windows of held-out text whose rows are put together, and their tokens."""


def evenly(stream: Tensor, count: int, length: int) -> Tensor:
    """Windows that are evenly spaced in a stream: ``[count, length]``."""
    starts = torch.linspace(0, len(stream) - length, count, device=stream.device).long()
    return stream[starts.unsqueeze(1) + torch.arange(length, device=stream.device)].long()


@torch.no_grad()
def perplexity(logits_of: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    """Of every token after the first of each window.

    Args:
        logits_of: of ids ``[1, L]``.
        windows: ``[N, L + 1]``.
    """
    losses = []
    for ids in windows:
        logits = logits_of(ids[None, :-1])[0].float()
        losses.append(float(F.cross_entropy(logits, ids[1:])))
    return round(math.exp(sum(losses) / len(losses)), 3)


@torch.no_grad()
def unions(model: PreTrainedModel, stream: Tensor) -> dict[str, Any]:
    """Experts that rows of different text read together, mean over positions and layers."""
    windows = evenly(stream, UNION_WINDOWS, UNION_LENGTH)
    experts = len(model.model.layers[0].mlp.gate.weight)
    kept: list[list[Tensor]] = [[] for _ in model.model.layers]
    with watched_gates(model, lambda layer, ids: kept[layer].append(ids)):
        for rows in windows.split(max(UNION_SIZES)):
            model.model(rows, use_cache=False)
    half = UNION_LENGTH // 2  # rows that follow text, as decode rows do
    ids = [
        torch.cat([part.view(-1, UNION_LENGTH, part.shape[-1]) for part in parts])[:, half:]
        for parts in kept
    ]
    found: dict[str, Any] = {"of": experts}
    for size in UNION_SIZES:
        of_layers = [
            float(torch.cat([union(rows, experts) for rows in layer.split(size)]).mean())
            for layer in ids
        ]
        found[str(size)] = {
            "mean": round(sum(of_layers) / len(of_layers), 2),
            "least_layer": round(min(of_layers), 2),
            "most_layer": round(max(of_layers), 2),
        }
    return found


def measure(folder: Path, windows: Tensor, heldout: Tensor, device: torch.device) -> dict[str, Any]:
    """All measurements of the checkpoint in ``folder``, by the stock model in bf16.

    Args:
        folder: checkpoint.
        windows: ``[N, L + 1]``, for the perplexity.
        heldout: the stream they are of.
        device: where it runs.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    with expert_counts(model) as counts:
        score = perplexity(lambda ids: model(ids).logits, windows)
    return {
        "perplexity": score,
        "experts_read": unions(model, heldout),
        "experts_on_heldout_text": usage(counts),
    }
