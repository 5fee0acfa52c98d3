"""Where a decode step's time goes on a GPU: kernels by name, time and calls."""

import itertools
import os
import time
from typing import Any

import torch

from sere_ray.bench.engines import decode_steps
from sere_ray.bench.models import Model
from sere_ray.bench.routing import Router
from sere_ray.bench.step_time import Bench

_STEPS = 10
_TOP = 40
_NAME_CHARACTERS = 160


def profile_arms(bench: Bench, router: Router, batch: int) -> list[dict[str, Any]]:
    """Rows of the profile: stock, then S = 1 without floor."""
    arms = [arm for arm in bench.settings if arm.name in ("stock", "S=1")]
    return [
        {
            "model": bench.plan.model.name,
            "router": router,
            "arm": arm.name,
            **profile_steps(bench.engine(arm), bench.plan.model, batch),
        }
        for arm in arms
    ]


def profile_steps(engine: Any, model: Model, batch: int, *, seed: int = 0) -> dict[str, Any]:
    """Kernels of ten decode steps, those that take longest first.

    Between two synchronisations of the GPU, ten steps are launched whole: the one that was in
    flight before has ended, the last one is waited for.
    """
    # CUDA graphs that were captured before do not survive CUPTI's leaving and coming back.
    os.environ["TEARDOWN_CUPTI"] = "0"
    os.environ["DISABLE_CUPTI_LAZY_REINIT"] = "1"
    steps = decode_steps(engine, model, batch, _STEPS + 16, seed=seed)
    for _ in range(4):
        next(steps)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        for _ in itertools.islice(steps, _STEPS):
            pass
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    for _ in steps:  # let the requests end
        pass
    kernels = kernel_rows(profiler.key_averages())
    return {
        "batch": batch,
        "steps": _STEPS,
        "step_ms_profiled": round(seconds / _STEPS * 1e3, 3),
        "kernel_ms_per_step": round(sum(row["ms_per_step"] for row in kernels), 3),
        "kernels": kernels[:_TOP],
    }


def kernel_rows(events: Any) -> list[dict[str, Any]]:
    """The profiler's events on the device, longest total time first, with copies and memsets."""
    found = [
        {
            "name": event.key[:_NAME_CHARACTERS],
            "ms_per_step": round(event.self_device_time_total / 1e3 / _STEPS, 5),
            "calls_per_step": round(event.count / _STEPS, 2),
        }
        for event in events
        if event.device_type.name == "CUDA"
    ]
    return sorted(found, key=lambda row: -row["ms_per_step"])
