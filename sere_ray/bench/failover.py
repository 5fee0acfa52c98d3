"""Experts whose rank is gone: what quality is left on the demo model, by what takes their place.

Experts lie on R ranks in vLLM's linear placement; every rank in turn is lost. The rest of the
model is exact (S = K), prompt rows are as much affected as decode rows. Teacher-forced as in
:mod:`sere_ray.evaluation.teacher_forced`: the prompt positions of B texts are one step, every
later position is one.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

from sere_ray import assets
from sere_ray.bench.demo_model import LENGTH, PROMPT_TOKENS, TOP_K, heldout_windows
from sere_ray.calibration import calibrate
from sere_ray.calibration.loading import load_model
from sere_ray.evaluation.teacher_forced import changed_choices, exact_logits
from sere_ray.rules import REROUTABLE, Choice, reroute
from sere_ray.util.progress import progress

RANKS = (8, 4, 2)
"""One of so many ranks is gone."""
BATCH = 16
RESAMPLES = 2000
METHODS = ("similar", "similar, any expert", "random", "drop", "drop, renormalised")
"""``similar``: the rule, among the experts that the step reads anyway. ``similar, any expert``:
the most similar one of all that are left. ``random``: the rule with random similarity. ``drop``:
the slot's part of the sum is missing; renormalised: the other weights are scaled to the same sum.
"""
BATCHED = ("similar", "random")
"""What depends on the other rows of a step, and is scored at batch 1 too."""


@dataclass(frozen=True)
class Scores:
    """Sums over the scored positions of each text, ``[texts]`` float64."""

    kl: NDArray[np.float64]
    agreement: NDArray[np.float64]
    loss: NDArray[np.float64]
    """Negative log-likelihood of the text's own next token; one position fewer."""
    experts_read: float
    """Distinct experts per layer and decode step, mean."""


@dataclass
class Failover:
    """Replaces the experts that are gone in a Hugging Face model.

    Attributes:
        method: of ``METHODS``.
        gone: ``[E]`` bool.
        similarity: decoder layer index -> ``[E, E]`` float32; random for ``random``.
        prompt_tokens: positions that are one step, together.
    """

    method: str
    gone: Tensor
    similarity: dict[int, Tensor]
    prompt_tokens: int
    layer_steps: int = 0
    experts_read: int = 0

    def forward(self, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        """Logits ``[B, L, V]`` of ``input_ids [B, L]``."""
        batch, length = input_ids.shape

        def change(layer: int, _: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Choice:
            ids = topk_ids.view(batch, length, -1)
            weights = topk_weights.view(batch, length, -1)
            all_ids, all_weights = torch.empty_like(ids), torch.empty_like(weights)
            steps = [slice(0, self.prompt_tokens)]
            steps += [slice(p, p + 1) for p in range(self.prompt_tokens, length)]
            for step in steps:
                new_ids, new_weights = self.replace(
                    layer, ids[:, step].flatten(0, 1), weights[:, step].flatten(0, 1)
                )
                all_ids[:, step] = new_ids.view_as(ids[:, step])
                all_weights[:, step] = new_weights.view_as(weights[:, step])
                if step.start:
                    self.layer_steps += 1
                    self.experts_read += len(set(new_ids[new_weights > 0].tolist()))
            return all_ids.view_as(topk_ids), all_weights.view_as(topk_weights)

        with torch.inference_mode(), changed_choices(model, change):
            logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
        return logits

    def replace(self, layer: int, ids: Tensor, weights: Tensor) -> Choice:
        """New ids and weights of one step's rows, ``[T, K]`` each."""
        is_gone = self.gone[ids]
        if self.method.startswith("drop"):
            kept = weights.masked_fill(is_gone, 0.0)
            if self.method == "drop":
                return ids, kept
            left = kept.sum(dim=1, keepdim=True)
            return ids, torch.where(left > 0, kept * weights.sum(dim=1, keepdim=True) / left, 0.0)
        similarity = self.similarity[layer]
        if self.method == "similar, any expert":
            nearest = similarity.masked_fill(self.gone, -torch.inf).argmax(dim=1)
            return torch.where(is_gone, nearest[ids], ids), weights
        kinds = torch.full((len(ids),), REROUTABLE, dtype=torch.int8)
        new_ids = reroute(
            ids,
            weights,
            similarity,
            row_kind=kinds,
            select_top_k=ids.shape[1],
            unavailable=self.gone,
        )
        return new_ids, weights


def score(
    model: PreTrainedModel,
    input_ids: Tensor,
    exact: Tensor,
    forward: Callable[[PreTrainedModel, Tensor], Tensor],
    *,
    batch: int,
    prompt_tokens: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Per text the sums of KL(exact || changed), top-1 agreement and loss.

    Args:
        model: the model.
        input_ids: ``[N, L]``.
        exact: ``[N, L - prompt_tokens, V]`` logits of the exact model.
        forward: logits ``[B, L, V]`` of the changed model.
        batch: B, texts that advance together.
        prompt_tokens: positions that are not scored.
    """
    sums: list[Tensor] = []
    for start in range(0, len(input_ids), batch):
        texts = input_ids[start : start + batch]
        logits = forward(model, texts)[:, prompt_tokens:].double()
        before = exact[start : start + batch].double()
        divergence = kl_div(
            log_softmax(logits, -1), log_softmax(before, -1), log_target=True, reduction="none"
        )
        loss = cross_entropy(
            logits[:, :-1].transpose(1, 2), texts[:, prompt_tokens + 1 :], reduction="none"
        )
        agreement = (logits.argmax(-1) == before.argmax(-1)).double()
        sums.append(torch.stack((divergence.sum((1, 2)), agreement.sum(1), loss.sum(1))))
    kl, agree, nll = torch.cat(sums, dim=1).numpy()
    return kl, agree, nll


def run_failover(
    save: Callable[[dict[str, Any]], None], *, ranks: tuple[int, ...] = RANKS, console: Console
) -> None:
    """Score every method with every rank gone in turn; ``save`` gets the content after each R."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = calibrate(
            str(assets.MODEL),
            data=str(assets.CALIBRATION),
            out=Path(folder) / "demo.safetensors",
            device="cpu",
            dtype="float32",
            console=console,
        )
    model = load_model(
        str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32"
    )
    windows = heldout_windows()
    exact = exact_logits(model, windows, PROMPT_TOKENS)

    def scores_of(method: str, batch: int, gone: Tensor, seed: int) -> Scores:
        similarity = dict(artifact.layers)
        if method == "random":
            generator = torch.Generator().manual_seed(seed)
            similarity = {
                layer: torch.rand(matrix.shape, generator=generator)
                for layer, matrix in similarity.items()
            }
        failover = Failover(method, gone, similarity, PROMPT_TOKENS)
        sums = score(
            model, windows, exact, failover.forward, batch=batch, prompt_tokens=PROMPT_TOKENS
        )
        return Scores(*sums, failover.experts_read / max(failover.layer_steps, 1))

    num_experts = artifact.metadata.num_experts
    owner = {count: torch.arange(num_experts) * count // num_experts for count in ranks}
    points = [(method, BATCH) for method in METHODS] + [(method, 1) for method in BATCHED]
    rows = [_row(0, "exact", BATCH, [scores_of("drop", BATCH, torch.zeros(num_experts) > 0, 0)])]
    total = sum(ranks) * len(points)
    with progress(console, total, task="failover", unit="settings") as advance:
        for count in ranks:
            for method, batch in points:
                found = []
                for rank in range(count):
                    found.append(scores_of(method, batch, owner[count] == rank, rank))
                    advance(1)
                rows.append(_row(count, method, batch, found))
            save(
                {
                    "model": "demo",
                    "num_experts": num_experts,
                    "top_k": TOP_K,
                    "texts": len(windows),
                    "scored_positions": exact.shape[0] * exact.shape[1],
                    "rows": rows,
                }
            )


def _row(ranks: int, method: str, batch: int, masks: list[Scores]) -> dict[str, Any]:
    """Means over masks and texts, their interval over texts, and the extremes over masks."""
    positions = LENGTH - PROMPT_TOKENS
    kl = np.stack([mask.kl for mask in masks]) / positions  # [masks, texts]
    agreement = np.stack([mask.agreement for mask in masks]) / positions
    loss = np.stack([mask.loss for mask in masks]) / (positions - 1)
    low, high = _interval(kl.mean(axis=0))
    agreement_low, agreement_high = _interval(agreement.mean(axis=0))
    perplexity = np.exp(loss.mean(axis=1))
    return {
        "gone": round(1 / ranks, 4) if ranks else 0,
        "method": method,
        "batch": batch,
        "masks": len(masks),
        "kl_mean": round(float(kl.mean()), 5),
        "kl_low": round(low, 5),
        "kl_high": round(high, 5),
        "kl_min_mask": round(float(kl.mean(axis=1).min()), 5),
        "kl_max_mask": round(float(kl.mean(axis=1).max()), 5),
        "top1_agreement": round(float(agreement.mean()), 4),
        "top1_low": round(agreement_low, 4),
        "top1_high": round(agreement_high, 4),
        "top1_min_mask": round(float(agreement.mean(axis=1).min()), 4),
        "top1_max_mask": round(float(agreement.mean(axis=1).max()), 4),
        "perplexity": round(float(np.exp(loss.mean())), 3),
        "perplexity_min_mask": round(float(perplexity.min()), 3),
        "perplexity_max_mask": round(float(perplexity.max()), 3),
        "experts_read": round(float(np.mean([mask.experts_read for mask in masks])), 2),
    }


def _interval(of_texts: NDArray[np.float64]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over texts."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(of_texts), (RESAMPLES, len(of_texts)))
    low, high = np.quantile(of_texts[draws].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)
