"""What re-routing saves where experts are read from memory: decode steps of a large random model.

The trained demo model fits a CPU's cache, so reading less of it saves no time. This one has its
number of experts and K, and 1.9 GB of them. Random weights have no quality, but a step takes as
long as that of a trained model which reads as many experts; so `margin`'s tau is sought at which
it reads what the setting reads on the trained model.
"""

import functools
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sere_ray import assets
from sere_ray.bench.arms import Arm, with_most_tau
from sere_ray.bench.demo_model import TOP_K
from sere_ray.bench.engines import (
    CPU_OPTIONS,
    decode_steps,
    prepare_process,
    start_engine,
    write_config,
)
from sere_ray.bench.model_shapes import CONFIG
from sere_ray.bench.models import Model
from sere_ray.bench.weights import draw_weights
from sere_ray.calibration.synthetic import synthetic_artifact
from sere_ray.demo.measure import label
from sere_ray.demo.serving import YIELDING
from sere_ray.engine.control import experts_read, read_counters, set_policy
from sere_ray.engine.vllm_internals import fill_dummy_weights
from sere_ray.policy.policy import Policy
from sere_ray.util.errors import SereError

ROUNDS, SECONDS = 7, 30.0
"""Most rounds, and after how long no further one starts; two are run in any case."""
STEPS = 9
"""Decode steps that are timed of a policy in a round."""
_TRIAL_STEPS = 4


@dataclass(frozen=True)
class Speed:
    """One policy: its decode step beside that of stock, in the same rounds."""

    policy: str
    tau: float | None
    """The one at which `margin` reads here what it reads on the trained model."""
    experts_read: float
    """Mean distinct experts per layer and decode step."""
    step_ms: float
    """Median over rounds of the median step."""
    speedup: float
    """Median over rounds of stock's step over this one's."""
    speedup_min: float
    speedup_max: float
    rounds: int


def model() -> Model:
    """Float32: every CPU computes with it as it is."""
    config = {
        **CONFIG,
        "num_hidden_layers": 5,
        "num_experts": assets.model_config()["num_experts"],
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": 640,
        "torch_dtype": "float32",
    }
    return Model("random: 5 layers x 48 experts, top-4, 1.9 GB, float32", config)


def measure_speed(
    policies: Sequence[Policy], reads: Sequence[float], rows: int, log: Path
) -> list[Speed]:
    """Time decode steps, in a process of its own that ends with its memory.

    Args:
        policies: stock first.
        reads: experts that each reads on the trained model with as many rows.
        rows: of a decode step.
        log: file for what vLLM prints.

    Raises:
        SereError: the engine does not start or does not compute.
    """
    kept = {name: os.environ.get(name) for name in YIELDING}
    os.environ.update(YIELDING)  # read when a process loads OpenMP, so set before it starts
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_measure, policies, reads, rows, str(log)).result()
    except Exception as error:  # whatever ended the engine: the log has more
        raise SereError(
            f"the large random model was not measured: {type(error).__name__}: {error}; it needs "
            f"4 GB of memory. {_last_line(log)}"
        ) from error
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return f"vLLM's last line: {lines[-1]}" if lines else ""


def _measure(
    policies: Sequence[Policy], reads: Sequence[float], rows: int, log: str
) -> list[Speed]:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    prepare_process()
    fill_dummy_weights(draw_weights)
    shape = model()
    with tempfile.TemporaryDirectory(prefix="sere-demo-speed-") as name:
        folder, similarity = write_config(shape, Path(name)), Path(name) / "sere.safetensors"
        synthetic_artifact(folder).save(similarity)
        here = {"similarity": str(similarity), "min_primary_experts": 0}
        policies = [policy.model_copy(update=here) for policy in policies]
        engine = start_engine(folder, policies[0], rows, False, CPU_OPTIONS)
        bench = _Bench(engine, shape, rows)
        found = [
            bench.at_reads(policy, wanted) for policy, wanted in zip(policies, reads, strict=True)
        ]
        names = [label(policy) for policy in policies]
        return bench.compare(names, found)


@dataclass(frozen=True)
class _Bench:
    engine: Any
    model: Model
    rows: int

    def at_reads(self, policy: Policy, wanted: float) -> Policy:
        """The policy; of `margin` with the largest tau that reads no fewer experts than wanted."""
        if policy.rule != "margin":
            return policy
        suffices = functools.partial(self._reads_at_least, wanted)
        found = with_most_tau(Arm("margin", policy), suffices).policy
        assert found
        return found

    def _reads_at_least(self, wanted: float, trial: Arm) -> bool:
        assert trial.policy
        return self._run(trial.policy, _TRIAL_STEPS, seed=0)[1] >= wanted

    def compare(self, names: Sequence[str], policies: Sequence[Policy]) -> list[Speed]:
        """All policies in every round, in random order; the first is what others are told by."""
        times: dict[str, list[float]] = {name: [] for name in names}
        reads: dict[str, float] = {}
        of_names, order = dict(zip(names, policies, strict=True)), random.Random(0)
        for name, policy in of_names.items():  # warms up and counts
            counted = {"mode": "observe"} if policy.mode == "off" else {}
            reads[name] = self._run(policy.model_copy(update=counted), STEPS, seed=0)[1]
        start = time.monotonic()
        for number in range(1, ROUNDS + 1):
            if number > 2 and time.monotonic() - start > SECONDS:
                break
            for name in order.sample(list(names), len(names)):
                times[name].append(self._run(of_names[name], STEPS, seed=number)[0])
        return [
            _row(name, policy, reads[name], times[name], times[names[0]])
            for name, policy in of_names.items()
        ]

    def _run(self, policy: Policy, steps: int, seed: int) -> tuple[float, float]:
        """Milliseconds of the median step, and experts read (0 in mode ``off``)."""
        set_policy(self.engine, policy)
        read_counters(self.engine, reset=True)
        ends = itertools.pairwise(
            decode_steps(self.engine, self.model, self.rows, steps, seed=seed)
        )
        step = statistics.median(after - before for before, after in ends)
        if policy.mode == "off":
            return step * 1e3, 0.0
        field = "experts_before" if policy.mode == "observe" else "experts_after"
        return step * 1e3, experts_read(read_counters(self.engine), field)


def _row(
    name: str, policy: Policy, reads: float, times: Sequence[float], stock: Sequence[float]
) -> Speed:
    ratios = [theirs / own for theirs, own in zip(stock, times, strict=True)]
    return Speed(
        policy=name,
        tau=policy.tau if isinstance(policy.tau, float) else None,
        experts_read=round(reads, 2),
        step_ms=round(statistics.median(times), 2),
        speedup=round(statistics.median(ratios), 3),
        speedup_min=round(min(ratios), 3),
        speedup_max=round(max(ratios), 3),
        rounds=len(ratios),
    )
