"""What one data-parallel rank of the expert-parallel benchmark does, in a process of its own.

Every rank makes the same calls in the same order, with prompts of its own and as many: vLLM runs
a pass on all ranks or on none.
"""

import dataclasses
import itertools
import os
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from sere_ray.bench.engines import (
    CPU_OPTIONS,
    _gpu_options,
    decode_steps,
    on_gpu,
    start_engine,
)
from sere_ray.bench.kernel_profile import profile_steps
from sere_ray.bench.models import Model
from sere_ray.bench.routing import Router, skew_gates
from sere_ray.engine.control import read_counters, set_policy
from sere_ray.engine.gpu import back_end
from sere_ray.engine.gpu.ranks import ranks_of_engine
from sere_ray.engine.vllm_internals import forget_environment, workspace_manager
from sere_ray.policy.policy import Policy

WAYS = ("global", "local", "before-dispatch")
"""Where the union is taken. ``global``: over all ranks, in the way that the engine chooses.
``local``: over each rank's own rows. ``before-dispatch``: over all ranks, before rows are sent."""
_WARM_UP_TOKENS = 10


@dataclass(frozen=True)
class RankPlan:
    """What all ranks measure; sent to their processes.

    Attributes:
        model: what to serve.
        folder: its configuration.
        similarity: the artifact.
        ways: of ``WAYS``; one engine each, beside stock.
        rows: decode rows per rank.
        arms: settings to time, by name; the value is what the policy adds, None is stock.
        repeats: interleaved repeats.
        tokens: timed decode steps of a repeat.
        routers: how tokens spread over experts, ``uniform`` first.
        ports: the first of some free ones, for each engine.
        compiled: run vLLM's compiled graphs.
        num_ranks: data-parallel size.
        profile_rows: decode rows per rank of steps whose kernels are listed; None = no profile.
    """

    model: Model
    folder: Path
    similarity: str
    ways: tuple[str, ...]
    rows: list[int]
    arms: dict[str, dict[str, Any] | None]
    repeats: int
    tokens: int
    routers: list[Router]
    ports: list[int]
    compiled: bool
    num_ranks: int
    profile_rows: int | None = None

    def policy(self, way: str, changes: dict[str, Any]) -> Policy:
        """The policy of an arm in one of the engines."""
        union = "local" if way == "local" else "global"
        key = {"similarity": self.similarity, "select_top_k": 1, "min_primary_experts": 0}
        return Policy.parse({**key, "union": union, **changes})

    @property
    def points(self) -> list[tuple[str | None, str]]:
        """What is timed: (way, arm); stock has no way."""
        named = [(None, name) for name, changes in self.arms.items() if changes is None]
        ways = itertools.product(self.ways, (n for n, c in self.arms.items() if c is not None))
        return [*named, *ways]


Report = dict[str, Any]
"""What one rank measured with one router and number of rows: ``ms`` and ``counters`` by point."""


def measure_rank(rank: int, plan: RankPlan, report: Callable[[Report], None]) -> None:
    """Start the engines of this rank and measure.

    Args:
        rank: of this process.
        plan: the same on all ranks.
        report: takes each :data:`Report`, and first one that is empty, when the engines run.
    """
    engines = _start_engines(rank, plan)
    report({})
    order = random.Random(0)  # the same on all ranks
    for router in plan.routers:
        if router == "skewed":
            for engine in engines.values():
                engine.apply_model(skew_gates)
        for rows in plan.rows:
            found = _measure_rows(rank, plan, engines, rows, order)
            report({"router": router, "rows": rows, **found})
    if plan.profile_rows:
        profile = _profile(rank, plan, engines, plan.profile_rows)
        report({"router": plan.routers[-1], "profile": profile})


def _profile(
    rank: int, plan: RankPlan, engines: dict[str | None, Any], rows: int
) -> dict[str | None, dict[str, Any]]:
    """Kernels of this rank in steps of stock, and of each way at S = 1, by way.

    A collective's time holds the wait for the other rank.
    """
    found = {}
    for way, engine in engines.items():
        if way:
            set_policy(engine, plan.policy(way, {}))
        found[way] = profile_steps(engine, plan.model, rows, seed=rank)
    return found


def _start_engines(rank: int, plan: RankPlan) -> dict[str | None, Any]:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_DP_RANK=str(rank),
        VLLM_DP_RANK_LOCAL=str(rank),
        VLLM_DP_SIZE=str(plan.num_ranks),
        VLLM_DP_MASTER_IP="127.0.0.1",
    )
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if on_gpu():
        options = _gpu_options(plan.model, plan.rows, plan.tokens, plan.compiled)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        options = dict(CPU_OPTIONS)
    options |= {"enable_expert_parallel": True, "distributed_executor_backend": "uni"}
    # Stock comes first, before anything is patched; on a CPU it cannot run without our patches.
    order = [None, *plan.ways] if on_gpu() else [*plan.ways, None]
    engines: dict[str | None, Any] = {}
    for way, port in zip(order, plan.ports, strict=True):
        forget_environment()
        os.environ["VLLM_DP_MASTER_PORT"] = str(port)  # each engine needs ports of its own
        policy = plan.policy(way, {}) if way else None
        with before_dispatch() if way == "before-dispatch" else nullcontext():
            engine = start_engine(plan.folder, policy, max(plan.rows), plan.compiled, options)
        engine.sere_kept = workspace_manager()  # see start_engines
        engines[way] = engine
    return engines


@contextmanager
def before_dispatch() -> Iterator[None]:
    """Engines that are started inside exchange before rows are dispatched, whatever their back end.

    A captured graph holds the way, so it cannot change later. Only a measurement wants this one
    where vLLM gathers.
    """

    def ranks(*arguments: Any) -> Any:
        return dataclasses.replace(ranks_of_engine(*arguments), before_dispatch=True)

    with mock.patch.object(back_end, "ranks_of_engine", ranks):
        yield


def _measure_rows(
    rank: int, plan: RankPlan, engines: dict[str | None, Any], rows: int, order: random.Random
) -> Report:
    times: dict[tuple[str | None, str], list[float]] = {}
    counters: dict[tuple[str | None, str], dict[str, Any]] = {}
    observed = [(way, "observe") for way in plan.ways[:1]]
    for repeat in range(plan.repeats + 1):
        points = plan.points if repeat else [*plan.points, *observed]  # the first one warms up
        for way, arm in order.sample(points, len(points)):
            engine, changes = engines[way], plan.arms.get(arm, {"mode": "observe"})
            if way:
                set_policy(engine, plan.policy(way, changes or {}))
                read_counters(engine, reset=True)
            tokens = plan.tokens if repeat else min(plan.tokens, _WARM_UP_TOKENS)
            seed = repeat * plan.num_ranks + rank
            ends = list(decode_steps(engine, plan.model, rows, tokens, seed=seed))
            if repeat:
                steps = [(b - a) * 1e3 for a, b in itertools.pairwise(ends)]
                times.setdefault((way, arm), []).append(statistics.median(steps))
            if way:
                counters[way, arm] = read_counters(engine)
    return {"ms": times, "counters": counters}
