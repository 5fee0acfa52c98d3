"""Copies of experts chosen by experts read, against vLLM's choice by rows: counted, not timed.

Decode steps of R ranks, each with rows of its own. A load balancer (vLLM's own policy) has dealt E
experts and some copies to the ranks by the rows that each expert got in *other* steps. Then a
step's ids are mapped to copies in both ways (:mod:`sere_ray.rules.replicas`), and what is counted
is how many the rank reads that reads the most. Ids are those of the demo model on held-out text,
with and without re-routing, and drawn ones in the shape of a large model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sere_ray import assets
from sere_ray.bench.demo_model import PROMPT_TOKENS, TOP_K, heldout_windows
from sere_ray.bench.scale import SHAPES, draw_choices
from sere_ray.calibration.loading import load_model
from sere_ray.engine.vllm_internals import balanced_placement
from sere_ray.evaluation.decode_batches import DecodeBatches
from sere_ray.policy.policy import Policy
from sere_ray.rules.common import named_by
from sere_ray.rules.replicas import by_tokens, choose_replicas, experts_of_ranks
from sere_ray.util.progress import progress

CPU = torch.device("cpu")
TEXTS, STEPS = 128, 32
ROWS_PER_RANK = (4, 16)
TAU = 0.02
"""Of ``margin``, where ids are re-routed first."""
RANKS_AND_REDUNDANT = ((4, 12), (8, 8), (8, 16))
"""Of the demo model's 48 experts. A quarter, 12, cannot be dealt to 8 ranks evenly."""
DRAWN_LAYERS, DRAWN_STEPS = 24, 16
DRAWN_RANKS_AND_REDUNDANT = ((4, 32), (8, 32))
"""Of 128 experts a quarter."""


@dataclass(frozen=True)
class Ids:
    """Final ids of decode steps: by layer ``[S, N, K]``, each step the rows of N texts."""

    source: str
    rule: str
    num_experts: int
    layers: list[Tensor]


def recorded() -> Iterator[Ids]:
    """The demo model's own, and what ``margin`` makes of them in batches of 16."""
    model = load_model(str(assets.MODEL), revision=None, device=CPU, dtype=torch.float32)
    texts = DecodeBatches(model, heldout_windows(TEXTS), PROMPT_TOKENS, {})
    rows = texts.record(STEPS)
    num_experts = len(next(iter(texts.layers.values())).gate_weight)
    yield Ids("demo", "none", num_experts, [ids for _, ids, _ in rows.values()])
    policy = Policy.parse({"similarity": "-", "rule": "margin", "tau": TAU}).for_model(top_k=TOP_K)
    _, rules = texts.rules_of(policy, TEXTS, batch=16)
    with torch.inference_mode():
        changed = [
            rules[layer](layer, *(part.contiguous() for part in row))[0]
            for layer, row in rows.items()
        ]
    yield Ids("demo", f"margin, tau {TAU}", num_experts, changed)


def drawn() -> Ids:
    """Of skewed gates in the shape of Qwen3-30B-A3B, as `sere-ray bench scale` draws them."""
    shape, generator = SHAPES[0], torch.Generator().manual_seed(0)
    layers = []
    for layer in range(DRAWN_LAYERS):
        rows = draw_choices(shape, DRAWN_STEPS * TEXTS, "skewed", layer, generator)
        layers.append(rows.view(DRAWN_STEPS, TEXTS, shape.top_k))
    return Ids(f"drawn, {shape.name}, skewed", "none", shape.num_experts, layers)


def count_reads(ids: Ids, ranks: int, redundant: int, rows_per_rank: int) -> dict[str, Any]:
    """A row of the result: means over layers, steps and batches.

    The odd steps are counted, the even ones are what the balancer places experts by.
    """
    experts = ids.num_experts
    loads = torch.stack([layer[::2].flatten().bincount(minlength=experts) for layer in ids.layers])
    placed = balanced_placement(loads, experts + redundant, ranks)
    alone = balanced_placement(loads, experts, ranks)
    sums = {"by_experts": 0.0, "by_tokens": 0.0, "without": 0.0}
    for layer, of_layer, of_alone in zip(ids.layers, placed, alone, strict=True):
        batch = ranks * rows_per_rank
        steps = layer[1::2, : layer.shape[1] // batch * batch].long()
        steps = steps.reshape(-1, ranks, rows_per_rank, steps.shape[-1])
        found = busiest_of(steps, of_layer, experts, ranks)
        found["without"] = busiest_of(steps, of_alone, experts, ranks)["by_tokens"]
        for way, busiest in found.items():
            sums[way] += float(busiest.double().mean()) / len(ids.layers)
    return {
        "ids": ids.source,
        "rule": ids.rule,
        "ranks": ranks,
        "rows_per_rank": rows_per_rank,
        "num_experts": experts,
        "redundant": redundant,
        "experts_max_rank": round(sums["by_experts"], 3),
        "experts_max_rank_by_tokens": round(sums["by_tokens"], 3),
        "experts_max_rank_without_copies": round(sums["without"], 3),
        "fewer": round(1 - sums["by_experts"] / sums["by_tokens"], 3),
    }


def busiest_of(steps: Tensor, placed: Tensor, num_experts: int, ranks: int) -> dict[str, Tensor]:
    """Experts of the busiest rank in each step, ``[S]``, by either way.

    Args:
        steps: ``[S, R, B, K]`` int64, ids of each rank's rows.
        placed: ``[P]`` the logical expert of each physical one.
        num_experts: E.
        ranks: R, each has P / R of them.
    """
    replicas, physical = copies_of(placed, num_experts), len(placed)
    per_rank = physical // ranks

    def busiest(chosen: Tensor) -> Tensor:
        """Of physical ids ``[S, n]``, some of them -1."""
        read = named_by(chosen[:, None], torch.ones(len(chosen), 1, dtype=torch.bool), physical)
        return experts_of_ranks(read, per_rank=per_rank).amax(dim=-1)

    rows = steps.flatten(1, 2)
    named = named_by(rows, torch.ones(rows.shape[:2], dtype=torch.bool), num_experts)
    return {
        "by_experts": busiest(choose_replicas(named, replicas, per_rank=per_rank)),
        "by_tokens": busiest(by_tokens(steps, replicas).flatten(1)),
    }


def copies_of(placed: Tensor, num_experts: int) -> Tensor:
    """``[E, R]`` int64: physical ids of each expert's copies, then -1, as vLLM keeps them."""
    places = [(placed == expert).nonzero().flatten().tolist() for expert in range(num_experts)]
    widest = max(map(len, places))
    return torch.tensor([found + [-1] * (widest - len(found)) for found in places])


def run_replica_reads(save: Callable[[dict[str, Any]], None], *, console: Console) -> None:
    """Count at every point; ``save`` gets the content."""
    sources: list[tuple[Ids, tuple[tuple[int, int], ...]]] = [
        (ids, RANKS_AND_REDUNDANT) for ids in recorded()
    ]
    sources.append((drawn(), DRAWN_RANKS_AND_REDUNDANT))
    todo = [
        (ids, ranks, redundant, rows)
        for ids, numbers in sources
        for ranks, redundant in numbers
        for rows in ROWS_PER_RANK
    ]
    rows = []
    with progress(console, len(todo), task="replicas", unit="points") as advance:
        for point in todo:
            rows.append(count_reads(*point))
            advance(1)
    save({"simulated": True, "per": "MoE layer and decode step", "rows": rows})
