"""How much any router could save on these requests: groups of equal size, made with all known.

Requests are divided by the experts that their answers chose, which no router knows before, and each
gang takes a group. That is k-means with equal groups, started several times, the best kept.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sere_ray.bench.locality.recorded import Request

_STARTS, _ROUNDS, _STEPS = 5, 15, 400


def ceiling(
    requests: Sequence[Request], gangs: int, rows: int, num_experts: int
) -> dict[str, float]:
    """Experts that a step reads, with requests spread at random and with requests in groups.

    Args:
        requests: all of them; a step's rows are drawn from them.
        gangs: groups.
        rows: of a step.
        num_experts: of a layer.

    Returns:
        ``experts_read`` of the best groups, and ``fewer`` than at random, as a share.
    """
    rng = np.random.default_rng(0)
    likes = np.stack([_likes(request, num_experts) for request in requests])
    mixed = _read(requests, [np.arange(len(requests))], rows, num_experts, rng)
    found = min(
        _read(requests, _groups(likes, gangs, rng), rows, num_experts, rng) for _ in range(_STARTS)
    )
    return {"experts_read": round(found, 3), "fewer": round(1 - found / mixed, 4)}


def _likes(request: Request, num_experts: int) -> NDArray[np.float64]:
    """Square roots of how often the answer chose each expert, of length 1."""
    ids = request.topk_ids[request.prompt_tokens :]
    layers = ids.shape[1]
    counts = [np.bincount(ids[:, i].ravel(), minlength=num_experts) for i in range(layers)]
    root = np.sqrt(np.concatenate(counts) / len(ids))
    found: NDArray[np.float64] = root / np.linalg.norm(root)
    return found


def _groups(
    likes: NDArray[np.float64], gangs: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Numbers of the requests of each group."""
    apart = likes - likes.mean(axis=0)
    centres = _first_centres(apart, gangs, rng)
    most = -(-len(apart) // gangs)
    for _ in range(_ROUNDS):
        group, size = np.full(len(apart), -1), np.zeros(gangs, dtype=np.int64)
        for flat in np.argsort(-(apart @ centres.T), axis=None):
            one, centre = divmod(int(flat), gangs)
            if group[one] < 0 and size[centre] < most:
                group[one], size[centre] = centre, size[centre] + 1
        centres = np.stack([apart[group == i].mean(axis=0) for i in range(gangs)])
    return [np.flatnonzero(group == i) for i in range(gangs)]


def _first_centres(
    points: NDArray[np.float64], count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Points far from each other: k-means++ (Arthur and Vassilvitskii, 2007)."""
    chosen = [int(rng.integers(len(points)))]
    while len(chosen) < count:
        distances = [((points - points[i]) ** 2).sum(axis=1) for i in chosen]
        nearest = np.min(distances, axis=0)
        chosen.append(int(rng.choice(len(points), p=nearest / nearest.sum())))
    return points[chosen]


def _read(
    requests: Sequence[Request],
    groups: Sequence[NDArray[np.int64]],
    rows: int,
    num_experts: int,
    rng: np.random.Generator,
) -> float:
    """Mean distinct experts of a layer, over steps whose rows are drawn from a group each."""
    total = 0.0
    for group in groups:
        for _ in range(_STEPS):
            drawn = [requests[i] for i in rng.choice(group, rows)]
            ids = np.stack(
                [r.topk_ids[r.prompt_tokens + int(rng.integers(r.steps))] for r in drawn]
            )
            layers = ids.shape[1]
            total += sum(len(np.unique(ids[:, layer])) for layer in range(layers)) / layers
    return total / len(groups) / _STEPS
