"""Decode step time of stock vLLM and of this plugin, in one run, on random weights.

An engine without the ``sere`` key (stock; one for each back end that may be its best) and one with
it take turns. Repeats are interleaved over all settings in random order, so that drift of the
machine hits all alike.
"""

import itertools
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sere_ray.bench.arms import Arm, arms, with_least_tau, with_most_tau
from sere_ray.bench.engines import (
    Engines,
    decode_steps,
    on_gpu,
    prompt_tokens,
    start_engines,
    write_config,
)
from sere_ray.bench.floor import copy_bytes_per_s, count_weights, mean_context, step_bytes
from sere_ray.bench.models import Model
from sere_ray.bench.routing import SIGMA, Router, check_rows_differ, skew_gates
from sere_ray.bench.synthetic_masks import synthetic_masks
from sere_ray.calibration.synthetic import synthetic_artifact
from sere_ray.engine.control import experts_read, read_counters, set_policy, slots_kept
from sere_ray.engine.vllm_internals import expert_kernel
from sere_ray.util.errors import SereError
from sere_ray.util.progress import progress

ROW_KEY = ("model", "router", "batch", "arm")  # what tells rows of a result file apart
_WARM_UP_TOKENS = 10
Save = Callable[[dict[str, Any]], None]
"""Takes the measured content of the result file so far."""


@dataclass(frozen=True)
class StepTimePlan:
    """What is measured.

    Attributes:
        model: what to serve.
        batches: decode batch sizes.
        repeats: interleaved repeats of every point.
        tokens: decode steps that are timed in a repeat.
        routers: how tokens spread over the experts.
        arms: names of the timed settings; None is all but those whose tau is sought first
            (``margin``, ``spare``), and on a GPU without ``observe``.
        compiled: run vLLM's compiled graphs; False = eager.
        masks: share of slots that random masks keep, in arms of their own; None = no masks.
    """

    model: Model
    batches: list[int]
    repeats: int
    tokens: int
    routers: tuple[Router, ...] = ("uniform",)
    arms: tuple[str, ...] | None = None
    compiled: bool = True
    masks: float | None = None

    def timed(self, settings: list[Arm]) -> list[Arm]:
        """The settings that are timed; stock always is, as the ratios need it.

        Raises:
            SereError: an arm that the model does not have.
        """
        names = [arm.name for arm in settings]
        sought = {arm.name for arm in settings if arm.policy and arm.policy.tau is not None}
        left_out = sought | ({"observe"} if on_gpu() else set())
        chosen = self.arms or tuple(n for n in names if n not in left_out)
        for name in chosen:
            if name not in names:
                raise SereError(f"--arms: {name!r} is none of {', '.join(names)}")
        return [arm for arm in settings if arm.name in chosen or arm.policy is None]


@dataclass(frozen=True)
class Bench:
    """What a running measurement has: the engines, the settings, and the floor of their times."""

    plan: StepTimePlan
    engines: Engines
    settings: list[Arm]
    kernels: dict[str, str]
    """What computes the experts: of the stock engines by back end, and of ``"sere"``."""
    floor: Callable[[int, float], float] | None
    """Milliseconds from batch and experts read; None on a CPU, whose cache gets in the way."""

    def engine(self, arm: Arm) -> Any:
        """The engine of an arm, with its policy set."""
        if not arm.policy:
            return self.engines.stock[arm.back_end]
        set_policy(self.engines.sere, arm.policy)
        return self.engines.sere


def measure(
    plan: StepTimePlan,
    *,
    console: Console,
    save: Save,
    then: Callable[[Bench, Router], None] | None = None,
) -> None:
    """Measure and save after every batch size.

    Args:
        plan: what is measured.
        console: where progress goes.
        save: called with ``{"rows": [...]}`` and, on a GPU, ``"copy_gb_per_s"``.
        then: called after the last row, with the engines and the value of ``--router`` that their
            gates are left with.

    Raises:
        SereError: the plan does not fit the model or this machine.
    """
    if "skewed" in plan.routers and not on_gpu():
        raise SereError("--router skewed: needs a GPU; on CPU vLLM packs the gates' weights away")
    with tempfile.TemporaryDirectory(prefix="sere-step-time-") as name:
        folder, similarity = write_config(plan.model, Path(name)), Path(name) / "sere.safetensors"
        masks = Path(name) / "masks.safetensors"
        settings = arms(str(similarity), plan.model, None if plan.masks is None else str(masks))
        plan.timed(settings)
        if plan.masks is not None:
            synthetic_masks(folder, plan.masks).save(masks)
        synthetic_artifact(folder, directed=True).save(similarity)  # for the arm `spare`
        bandwidth = copy_bytes_per_s() if on_gpu() else None  # before the engines fill the memory
        console.print(f"starting {len(plan.model.stock_back_ends) + 1} engines: {plan.model.name}")
        bench = _start(plan, folder, settings, bandwidth)
        header = {"copy_gb_per_s": [round(bandwidth / 1e9, 1)]} if bandwidth else {}
        _measure(bench, console, lambda rows: save({**header, "rows": rows}))
        if then:
            then(bench, _in_order(plan.routers)[-1])


def _start(plan: StepTimePlan, folder: Path, settings: list[Arm], bandwidth: float | None) -> Bench:
    first = next(arm.policy for arm in settings if arm.policy)
    engines = start_engines(folder, plan.model, first, plan.batches, plan.tokens, plan.compiled)
    kernels = dict(zip((*engines.stock, "sere"), engines.each(expert_kernel), strict=True))
    floor = _floor(plan, engines, bandwidth) if bandwidth else None
    return Bench(plan, engines, settings, kernels, floor)


def _in_order(routers: tuple[Router, ...]) -> list[Router]:
    return sorted(set(routers), reverse=True)  # uniform first: gates are scaled in place


def _floor(plan: StepTimePlan, engines: Engines, bandwidth: float) -> Callable[[int, float], float]:
    weights = engines.each(count_weights)[-1]
    context = mean_context(prompt_tokens(), plan.tokens)
    per_token = plan.model.kv_bytes_per_token

    def milliseconds(batch: int, experts: float) -> float:
        size = step_bytes(
            weights, experts_read=experts, batch=batch, context=context, kv_per_token=per_token
        )
        return size / bandwidth * 1e3

    return milliseconds


def _measure(bench: Bench, console: Console, save: Callable[[list[dict[str, Any]]], None]) -> None:
    plan = bench.plan
    rows: list[dict[str, Any]] = []
    points = len(plan.routers) * len(plan.batches) * (plan.repeats + 1)
    order = random.Random(0)
    with progress(console, points, task="measure", unit="repeats") as advance:
        for router in _in_order(plan.routers):
            if router == "skewed":
                bench.engines.each(skew_gates)
            for batch in plan.batches:
                rows += _measure_batch(bench, router, batch, order, lambda: advance(1))
                save(rows)


def _measure_batch(
    bench: Bench, router: Router, batch: int, order: random.Random, advance: Callable[[], None]
) -> list[dict[str, Any]]:
    times: dict[str, list[list[float]]] = {}
    experts: dict[str, float] = {}
    kept: dict[str, dict[str, float]] = {}
    timed = [
        _with_tau(bench, arm, batch) if arm.policy and arm.policy.tau is not None else arm
        for arm in bench.plan.timed(bench.settings)
    ]
    observe = next(arm for arm in bench.settings if arm.name == "observe")
    counted = timed if observe in timed else [*timed, observe]
    for repeat in range(bench.plan.repeats + 1):
        arms_now = timed if repeat else counted  # the first one warms up and counts
        for arm in order.sample(arms_now, len(arms_now)):
            engine = bench.engine(arm)
            if arm.policy:
                read_counters(engine, reset=True)
            counts = repeat or arm.name == "observe"
            tokens = bench.plan.tokens if counts else min(bench.plan.tokens, _WARM_UP_TOKENS)
            intervals = _step_ms(bench, engine, batch, tokens, seed=repeat)
            if repeat:
                times.setdefault(arm.name, []).append(intervals)
            if arm.policy and arm.policy.mode == "on":
                counters = read_counters(engine)
                experts[arm.name] = experts_read(counters, "experts_after")
                if arm.policy.level:
                    kept[arm.name] = {"slots_kept": round(slots_kept(counters), 4)}
            elif arm.name == "observe":
                before = experts_read(read_counters(engine), "experts_before")
                experts |= dict.fromkeys([a.name for a in timed if _is_exact(a)], before)
                experts[arm.name] = before
                if on_gpu():
                    sigma = SIGMA if router == "skewed" else 0.0
                    check_rows_differ(bench.plan.model.gate, batch, sigma, before)
        advance()
    stock = min(
        (arm for arm in timed if not arm.policy),
        key=lambda arm: statistics.median(map(statistics.median, times[arm.name])),
    )
    found = [_row(bench, router, batch, arm, stock, times, experts[arm.name]) for arm in timed]
    return [row | kept.get(row["arm"], {}) for row in found]


def _is_exact(arm: Arm) -> bool:
    return arm.policy is None or arm.policy.mode == "off"


def _with_tau(bench: Bench, arm: Arm, batch: int) -> Arm:
    """The arm with the largest tau at which it reads no fewer experts than S = 2; with a budget,
    with the smallest one at which it reads no more."""

    def experts_of(trial: Arm) -> float:
        engine = bench.engine(trial)
        read_counters(engine, reset=True)
        _step_ms(bench, engine, batch, _WARM_UP_TOKENS, seed=0)
        return experts_read(read_counters(engine), "experts_after")

    def of(name: str) -> float:
        return experts_of(next(other for other in bench.settings if other.name == name))

    if arm.budget is not None:
        most = max(float(arm.budget), of("S=1"))
        return with_least_tau(arm, lambda trial: experts_of(trial) <= most)
    wanted = of("S=2")
    return with_most_tau(arm, lambda trial: experts_of(trial) >= wanted)


def _row(
    bench: Bench,
    router: Router,
    batch: int,
    arm: Arm,
    stock: Arm,
    times: dict[str, list[list[float]]],
    experts: float,
) -> dict[str, Any]:
    own = times[arm.name]
    step_ms, stock_ms = ([statistics.median(t) for t in of] for of in (own, times[stock.name]))
    mean_ms = [statistics.fmean(t) for t in own]
    ratios = [theirs / ours for theirs, ours in zip(stock_ms, step_ms, strict=True)]
    row = {
        "model": bench.plan.model.name,
        "format": bench.plan.model.format,
        "router": router,
        "batch": batch,
        "arm": arm.name,
        "select_top_k": arm.select_top_k,
        "tau": arm.policy.tau if arm.policy else None,
        "mode": arm.policy.mode if arm.policy else None,
        "step_ms": round(statistics.median(step_ms), 3),
        "step_ms_min": round(min(step_ms), 3),
        "step_ms_max": round(max(step_ms), 3),
        "step_ms_mean": round(statistics.median(mean_ms), 3),
        "stock_step_ms": round(statistics.median(stock_ms), 3),
        "speedup": round(statistics.median(ratios), 3),
        "speedup_min": round(min(ratios), 3),
        "speedup_max": round(max(ratios), 3),
        "repeats": len(step_ms),
        "experts_read": round(experts, 2),
        "experts_kernel": bench.kernels["sere" if arm.policy else arm.back_end],
        "stock_experts_kernel": bench.kernels[stock.back_end],
    }
    if bench.floor:
        row["floor_ms"] = round(bench.floor(batch, experts), 3)
    return row


def _step_ms(bench: Bench, engine: Any, batch: int, tokens: int, seed: int) -> list[float]:
    """Milliseconds between the ends of steps in which every row decodes."""
    ends = itertools.pairwise(decode_steps(engine, bench.plan.model, batch, tokens, seed=seed))
    return [(after - before) * 1e3 for before, after in ends]
