"""`sere-ray bench locality`: every way to place requests on the same traffic, several times."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from sere_ray import assets
from sere_ray.bench.locality.ceiling import ceiling
from sere_ray.bench.locality.knowledge import (
    FromItself,
    FromName,
    FromText,
    Knowledge,
    Mixed,
    TextAlone,
)
from sere_ray.bench.locality.recorded import Request, record, turns_of
from sere_ray.bench.locality.rules import RULES
from sere_ray.bench.locality.simulate import arrivals, simulate
from sere_ray.bench.locality.texts import KINDS
from sere_ray.engine.signatures import Floats
from sere_ray.util.errors import SereError
from sere_ray.util.progress import progress
from sere_ray.util.results import write_result

GANGS = (2, 4)
ROWS_OF_A_GANG = (8, 16)
SEEDS = 3
ORDERS = ("mixed", "bursts")
TRAFFIC = (*ORDERS, *KINDS)


class Way(NamedTuple):
    """How requests are placed."""

    router: str
    rule: str
    knows: str


def ways() -> Iterator[Way]:
    """Ray's own first."""
    yield Way("power_of_two", "power_of_two", "nothing")
    yield Way("round_robin", "round_robin", "nothing")
    for knows in KNOWS:
        yield Way("experts", "balance_first", knows)
    yield Way("experts", "likeness_first", "text")
    yield Way("experts", "likeness_first", "itself")


KNOWS: dict[str, Callable[[int], Knowledge]] = {
    "text": lambda num_experts: FromText(),
    "conversation": lambda num_experts: FromName("conversation"),
    "prefix": lambda num_experts: FromName("prefix"),
    "key": lambda num_experts: FromName("key"),
    "conversation, text": lambda num_experts: Mixed(FromName("conversation"), FromText()),
    "text alone": lambda num_experts: TextAlone(),
    "itself": FromItself,
}
"""What a router knows of a request that comes, by name; `itself` is known only afterwards."""


def run_locality(
    out: Path,
    *,
    conversations: int,
    traffic: Sequence[str],
    console: Console,
) -> None:
    """Simulate every point, and write the result after each.

    Args:
        out: the result file; replaced, each time in one step.
        conversations: of each kind, at most.
        traffic: of :func:`~sere_ray.bench.locality.simulate.arrivals`.
        console: where progress goes.

    Raises:
        SereError: there is no such traffic.
    """
    for name in traffic:
        if name not in TRAFFIC:
            raise SereError(f"--traffic: {name!r} is none of {', '.join(TRAFFIC)}")
    turns = turns_of(conversations, 0)
    with progress(console, len(turns), task="routing", unit="texts") as advance:
        requests = record(turns, advance)
    num_experts = int(assets.model_config()["num_experts"])
    points = [
        (order, gangs, rows) for order in traffic for gangs in GANGS for rows in ROWS_OF_A_GANG
    ]
    about = {"simulated": True, "requests": len(requests), "num_experts": num_experts}
    rows_found: list[dict[str, Any]] = []
    with progress(console, len(points), task="locality", unit="points") as advance:
        for order, gangs, rows in points:
            coming = [arrivals(requests, gangs * rows, order, seed) for seed in range(SEEDS)]
            rows_found.append(_ceiling(requests, order, gangs, rows, num_experts))
            rows_found += _rows(coming, order, gangs, rows, num_experts)
            write_result(out, {**about, "rows": rows_found}, row_lines=True)
            advance(1)


def _ceiling(
    requests: Sequence[Request], order: str, gangs: int, rows: int, num_experts: int
) -> dict[str, Any]:
    chosen = [r for r in requests if order in (*ORDERS, r.kind)]
    about = {"router": "ceiling", "traffic": order, "gangs": gangs, "rows_of_a_gang": rows}
    return {**about, **ceiling(chosen, gangs, rows, num_experts)}


def _rows(
    coming: Sequence[Any], order: str, gangs: int, rows: int, num_experts: int
) -> list[dict[str, Any]]:
    found = []
    base: list[float] = []
    for way in ways():
        runs = [
            simulate(steps, gangs, num_experts, RULES[way.rule](random.Random(seed)), knows)
            for seed, steps in enumerate(coming)
            for knows in [KNOWS.get(way.knows, Nothing)(num_experts)]
        ]
        read = [run["experts_a_row"] for run in runs]
        base = base or read
        less = [1 - own / other for own, other in zip(read, base, strict=True)]
        found.append(
            {
                "router": way.router,
                "traffic": order,
                "gangs": gangs,
                "rows_of_a_gang": rows,
                "rule": way.rule,
                "knows": way.knows,
                **{name: round(fmean(run[name] for run in runs), 4) for name in runs[0]},
                "fewer": round(fmean(less), 4),
                "fewer_sd": round(float(np.std(less, ddof=1)), 4),
            }
        )
    return found


class Nothing(Knowledge):
    """A router that looks at loads alone."""

    def __init__(self, num_experts: int) -> None:
        pass

    def tell(self, request: Request, key: str) -> None:
        """Nothing."""

    def learn(self, request: Request, key: str, signature: Floats) -> None:
        """Nothing."""
