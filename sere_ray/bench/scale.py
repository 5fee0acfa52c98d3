"""Re-routing on up to 256 expert-parallel ranks, simulated: no model runs and nothing is timed.

R ranks with N rows each route to E experts, which lie on the ranks in vLLM's linear placement.
Drawn are the gates' logits (:mod:`sere_ray.bench.routing`) and the similarity: that of random
points, see :func:`random_similarity`. Everything else is counted: the experts that each rank
reads, and the ranks that each row is sent to, once each, beside its home rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from sere_ray.bench.routing import ROUTERS, Router, expert_scales
from sere_ray.util.progress import progress

RANKS = (8, 16, 64, 256)
ROWS_PER_RANK = (1, 4, 16, 64, 256)
THRESHOLD = 0.6
"""Above it lie the similarities of a fifth to a third of all pairs of `random_similarity`."""
SAMPLED_ROWS = 2048
"""How many rows the samples of a point have together. There are at least 2 samples, at most 24."""


@dataclass(frozen=True)
class Shape:
    """The numbers of a model's MoE layers."""

    name: str
    num_experts: int
    top_k: int
    hidden_size: int


SHAPES = (
    Shape("qwen3-30b-a3b", 128, 8, 2048),
    Shape("deepseek-v3", 256, 8, 7168),
)


@dataclass(frozen=True)
class Arm:
    """One setting of the rule; the floor is K, as by default."""

    select_top_k: int
    union: str = "global"
    threshold: float | None = None


def arms(top_k: int) -> list[Arm]:
    """Stock (S = K) first."""
    found = [Arm(top_k)]
    for size in (2, 1):
        found += [Arm(size, union, rho) for rho in (None, THRESHOLD) for union in UNIONS]
    return found


UNIONS = ("global", "local")


def random_similarity(num_experts: int, generator: torch.Generator) -> Tensor:
    """``[E, E]`` float32: 1 - d / max d for distances d of random points.

    32 dimensions and lengths spread log-normally by 0.25. Of 128 points the quartiles off the
    diagonal are 0.44, 0.51, 0.58 and each point's nearest is at 0.66 (median); of the trained
    demo model's layers 0.46, 0.51, 0.56 and 0.62 (layer 0), 0.62, 0.68, 0.71 and 0.73 (layer 3).
    """
    points = torch.randn((num_experts, DIMENSIONS), generator=generator, dtype=torch.float64)
    points *= torch.exp(SPREAD * torch.randn((num_experts, 1), generator=generator))
    distance = torch.cdist(points, points)
    return (1 - distance / distance.max()).float().fill_diagonal_(1.0)


DIMENSIONS, SPREAD = 32, 0.25


def draw_choices(
    shape: Shape, rows: int, router: Router, layer: int, generator: torch.Generator
) -> Tensor:
    """``[rows, K]`` int64 expert ids, the best first."""
    logits = torch.randn((rows, shape.num_experts), generator=generator)
    if router == "skewed":
        logits *= torch.from_numpy(expert_scales(shape.num_experts, layer)).float()
    return logits.topk(shape.top_k, dim=1).indices


def reroute_ranks(ids: Tensor, similarity: Tensor, arm: Arm, *, ranks: int) -> Tensor:
    """The rule for all ranks at once, without a loop over rows or ranks.

    Equal to :func:`sere_ray.rules.reroute` where every row is re-routable and slots are sorted by
    weight (tests/bench/test_scale.py).

    Args:
        ids: ``[T, K]`` int64, valid; the rows of each rank are consecutive.
        similarity: ``[E, E]`` float32.
        arm: S, rho, union; m = K.
        ranks: R, a divisor of T and of E.

    Returns:
        ``[T, K]`` new ids.
    """
    (num_rows, num_slots), num_experts = ids.shape, similarity.shape[0]
    if arm.select_top_k >= num_slots:
        return ids.clone()
    groups = ranks if arm.union == "local" else 1
    group = torch.arange(num_rows) // (num_rows // groups)
    entry = group[:, None] * num_experts + ids
    slot = torch.arange(num_slots).expand_as(ids)
    lowest = torch.full((groups * num_experts,), num_slots)
    lowest.scatter_reduce_(0, entry.flatten(), slot.flatten(), "amin")
    lowest = lowest.view(groups, num_experts)

    at_most = lowest[:, :, None] < torch.arange(1, num_slots + 1)
    size_of = at_most.sum(dim=1)  # [G, K]: |P_1|..|P_K|
    enough = size_of[:, -1:].clamp(max=num_slots)
    effective = ((size_of < enough).sum(dim=1) + 1).clamp(min=arm.select_top_k)
    primary = lowest < effective[:, None]

    masked = torch.where(primary[:, None, :], similarity, -torch.inf)  # [G, E, E]
    best, nearest = masked.max(dim=2)
    rho = torch.tensor(-torch.inf if arm.threshold is None else arm.threshold).float()
    stays = primary | (best < rho)
    target = torch.where(stays, torch.arange(num_experts), nearest)
    return target.flatten()[entry]


def count_reads_and_rows(
    ids: Tensor, new_ids: Tensor, shape: Shape, ranks: int
) -> dict[str, float]:
    """What one layer reads and sends after the rule; counts of rows sent are those of all-to-all.

    A row is sent once to each rank but its home that holds one of its experts, with K ids (int32)
    and K weights (float32); it returns summed. Hidden states are bf16 both ways.
    """
    num_rows, num_experts = len(ids), shape.num_experts
    read = torch.zeros(num_experts, dtype=torch.bool)
    read[new_ids.flatten()] = True
    of_rank = read.view(ranks, -1).sum(dim=1)
    visits = torch.zeros((num_rows, ranks), dtype=torch.bool)
    visits.scatter_(1, new_ids // (num_experts // ranks), True)
    visits.scatter_(1, torch.arange(num_rows)[:, None] // (num_rows // ranks), False)
    away = visits.sum(dim=1)
    destinations = float(away.float().mean())
    row = 2 * shape.hidden_size
    return {
        "experts_read": float(read.sum()),
        "experts_read_mean": float(of_rank.float().mean()),
        "experts_read_max_rank": float(of_rank.max()),
        "destination_ranks_mean": destinations,
        "rows_received_max_rank": float(visits.sum(dim=0).max()),
        "kib_per_row": destinations * (2 * row + 8 * shape.top_k) / 1024,
        "slots_rerouted": float((new_ids != ids).float().mean()) * shape.top_k,
    }


def points() -> Iterator[tuple[Shape, Router, int, int]]:
    """Shape, router, ranks, rows per rank; no rank is without an expert."""
    for shape in SHAPES:
        for router in ROUTERS:
            for ranks in RANKS:
                if ranks <= shape.num_experts:
                    yield from ((shape, router, ranks, rows) for rows in ROWS_PER_RANK)


def simulate(shape: Shape, router: Router, ranks: int, rows_per_rank: int) -> list[dict[str, Any]]:
    """Simulate all arms on the same rows; the numbers are means over samples.

    Each sample has a gate of its own, as a layer has.
    """
    rows = ranks * rows_per_rank
    samples = min(max(SAMPLED_ROWS // rows, 2), 24)
    found: dict[Arm, list[dict[str, float]]] = {arm: [] for arm in arms(shape.top_k)}
    for sample in range(samples):
        generator = torch.Generator().manual_seed(sample)
        similarity = random_similarity(shape.num_experts, generator)
        ids = draw_choices(shape, rows, router, sample, generator)
        for arm, counts in found.items():
            new_ids = reroute_ranks(ids, similarity, arm, ranks=ranks)
            counts.append(count_reads_and_rows(ids, new_ids, shape, ranks))
    return [
        {
            "shape": shape.name,
            "router": router,
            "ranks": ranks,
            "rows_per_rank": rows_per_rank,
            "select_top_k": arm.select_top_k,
            "union": arm.union,
            "threshold": arm.threshold,
            "samples": samples,
            **{
                name: round(float(np.mean([count[name] for count in counts])), 3)
                for name in counts[0]
            },
            **{
                f"{name}_sd": round(float(np.std([count[name] for count in counts], ddof=1)), 3)
                for name in ("experts_read_max_rank", "destination_ranks_mean")
            },
        }
        for arm, counts in found.items()
    ]


def run_scale(save: Callable[[dict[str, Any]], None], *, console: Console) -> None:
    """Simulate every point; ``save`` gets the content after each."""
    rows: list[dict[str, Any]] = []
    todo = list(points())
    with progress(console, len(todo), task="scale", unit="points") as advance:
        for point in todo:
            rows += simulate(*point)
            save({"simulated": True, "shapes": [vars(shape) for shape in SHAPES], "rows": rows})
            advance(1)
