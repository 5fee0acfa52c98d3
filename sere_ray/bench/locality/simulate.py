"""Gangs that decode recorded requests: what each step reads, under one way to place them.

Time is steps. In a step every gang computes one row of each of its requests, the first step of a
request being its prompt. Requests come at random, so many a step that each gang has on average the
number of rows asked for. Nothing is timed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sere_ray.bench.locality.knowledge import Knowledge, TextAlone, signature_of
from sere_ray.bench.locality.recorded import Request
from sere_ray.bench.locality.rules import Rule
from sere_ray.engine.signatures import Floats
from sere_ray.serve.by_experts.placement import Gang, Likes
from sere_ray.serve.by_experts.text import text_vector

KEYS_OF_KIND = 3
KEY_IS_TRUE = 0.8
"""How likely a key asks for its own kind of text."""
NOTHING = np.zeros(1, dtype=np.float32)
WARM_UP = 0.15
"""Share of the steps at the start that are not counted, and as much at the end."""


@dataclass
class Running:
    """A request in a gang."""

    request: Request
    age: int = -1  # -1 is the prompt's step

    @property
    def row(self) -> NDArray[np.uint8]:
        """``[layers, K]`` of its decode row in this step."""
        found: NDArray[np.uint8] = self.request.topk_ids[self.request.prompt_tokens + self.age]
        return found


@dataclass
class Steps:
    """What was counted."""

    read: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    told: int = 0
    placed: int = 0

    def figures(self) -> dict[str, float]:
        """Means over gangs and steps with a row."""
        read, rows = np.array(self.read), np.array(self.rows)
        return {
            "experts_read": round(float(read.mean()), 3),
            "experts_a_row": round(float(read.sum() / rows.sum()), 4),
            "rows": round(float(rows.mean()), 2),
            "load_spread": round(float(np.mean(self.spread)), 4),
            "known": round(self.told / max(self.placed, 1), 3),
        }


def arrivals(
    requests: Sequence[Request], rows: float, order: str, seed: int
) -> list[list[tuple[Request, str]]]:
    """Requests and their keys by step; a conversation's turns come in their order.

    Args:
        requests: each comes once.
        rows: mean number of rows, over all gangs.
        order: ``mixed``, ``bursts`` (one kind after the other prevails) or the name of a kind.
        seed: of everything drawn.
    """
    rng = random.Random(seed)
    chosen = [r for r in requests if order in ("mixed", "bursts", r.kind)]
    left: dict[int, list[Request]] = {}
    for request in sorted(chosen, key=lambda r: r.turn):
        left.setdefault(request.conversation, []).append(request)
    open_ones = {name: turns[0].kind for name, turns in left.items()}
    kinds = sorted(set(open_ones.values()))
    mean_steps = 1 + float(np.mean([request.steps for request in chosen]))
    draw = np.random.default_rng(seed)
    steps: list[list[tuple[Request, str]]] = []
    came = 0
    while open_ones:
        now = []
        for _ in range(min(int(draw.poisson(rows / mean_steps)), came + 2**20)):
            if not open_ones:
                break
            prevails = kinds[came * 8 // len(chosen) % len(kinds)] if order == "bursts" else None
            name = _drawn(rng, open_ones, prevails)
            request = left[name].pop(0)
            if not left[name]:
                del open_ones[name]
            now.append((request, _key(rng, request.kind, kinds)))
            came += 1
        steps.append(now)
    return steps


def _drawn(rng: random.Random, open_ones: dict[int, str], prevails: str | None) -> int:
    of_kind = [name for name, kind in open_ones.items() if kind == prevails]
    if of_kind and rng.random() < 0.7:
        return rng.choice(of_kind)
    kinds = sorted(set(open_ones.values()))
    kind = rng.choice(kinds)
    return rng.choice([name for name, own in open_ones.items() if own == kind])


def _key(rng: random.Random, kind: str, kinds: Sequence[str]) -> str:
    own = kind if rng.random() < KEY_IS_TRUE else rng.choice(kinds)
    return f"{own}-{rng.randrange(KEYS_OF_KIND)}"


def simulate(
    coming: Sequence[Sequence[tuple[Request, str]]],
    gangs: int,
    num_experts: int,
    rule: Rule,
    knowledge: Knowledge,
) -> dict[str, float]:
    """Run all arrivals; returns :meth:`Steps.figures`.

    Args:
        coming: of :func:`arrivals`.
        gangs: how many there are.
        num_experts: of a layer.
        rule: says which gang takes a request.
        knowledge: what is known of a request.
    """
    running: list[list[Running]] = [[] for _ in range(gangs)]
    likes: list[Likes] = []
    steps, usual = Steps(), _Mean()
    first, last = int(len(coming) * WARM_UP), int(len(coming) * (1 - WARM_UP))
    for step, now in enumerate(coming):
        for request, key in now:
            wanted = knowledge.tell(request, key)
            steps.placed += 1
            steps.told += wanted is not None
            seen = [
                Gang(str(number), float(len(mine)), likes[number].mean if likes else NOTHING)
                for number, mine in enumerate(running)
            ]
            place = int(rule(seen, wanted, usual.of(wanted)).name)
            is_text = isinstance(knowledge, TextAlone)
            own = text_vector(request.prompt) if is_text else signature_of(request, num_experts)
            usual.add(own)
            likes = likes or [Likes(len(own)) for _ in running]
            likes[place].add(own)
            running[place].append(Running(request))
            knowledge.learn(request, key, own)
        if first <= step < last:
            _count(steps, running, num_experts)
        for mine in running:
            for one in mine:
                one.age += 1
            mine[:] = [one for one in mine if one.age < one.request.steps]
    return steps.figures()


class _Mean:
    """Running mean of signatures."""

    def __init__(self) -> None:
        self._sum: Floats | None = None
        self._count = 0

    def add(self, vector: Floats) -> None:
        self._sum = vector.copy() if self._sum is None else self._sum + vector
        self._count += 1

    def of(self, like: Floats | None) -> Floats:
        if self._sum is None:
            return np.zeros(1 if like is None else len(like), dtype=np.float32)
        return self._sum / np.float32(self._count)


def _count(steps: Steps, running: Sequence[Sequence[Running]], num_experts: int) -> None:
    loads = [len(mine) for mine in running]
    if sum(loads):
        steps.spread.append((max(loads) - min(loads)) / (sum(loads) / len(loads)))
    for mine in running:
        rows = [one.row for one in mine if one.age >= 0]
        if not rows:
            continue
        stacked = np.stack(rows)  # [rows, layers, K]
        layers = stacked.shape[1]
        read = np.zeros((layers, num_experts), dtype=bool)
        for layer in range(layers):
            read[layer, stacked[:, layer].ravel()] = True
        steps.read.append(float(read.sum()) / layers)
        steps.rows.append(len(rows))
