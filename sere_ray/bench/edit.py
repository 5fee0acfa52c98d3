"""Four workers train masks of the demo model: each way of meeting, several seeds, each fault."""

import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sere_ray import assets
from sere_ray.masks.plan import Sync, TrainSettings, prepare_training
from sere_ray.masks.ray_training import Job, train_on_ray
from sere_ray.masks.training import Training
from sere_ray.masks.work_folder import WorkFolder

METHODS: tuple[Sync, ...] = ("allreduce", "edit", "a-edit")
WORKERS = 4
SYNC_EVERY = 5
"""Steps of EDiT between two meetings."""
SLOWER = 3.0
"""How many times as long a slow worker takes for a step."""
LOUDER = 1000.0
"""How many times too large the loss of garbage is."""
_SPIKE = 0.7, 0.75
"""Share of a level's steps between which a worker is fed garbage."""
_DEATH = 0.5
"""Share of the steps after which a worker is killed."""


class Measured(Training):
    """A training that takes down how long it took, and how often EDiT left something out."""

    save_seconds = 1.0

    def run(self) -> None:
        """See :class:`Training`."""
        start = time.monotonic()
        super().run()
        # one that had ended before others were started again has nothing new to say
        if self.exchange.rank == 0 and not _beside(self.work, "json").exists():
            about = {"seconds": time.monotonic() - start, "left_out": self.left_out}
            _beside(self.work, "json").write_text(json.dumps(about))

    @property
    def fails(self) -> bool:
        """Whether this is the worker that a fault strikes: the last one."""
        return self.exchange.rank == self.exchange.size - 1

    def share_of(self, unit: int) -> float:
        """Which share of the level's steps lies before a unit."""
        return unit / self.units.total


class Slow(Measured):
    """One worker takes three times as long for each step."""

    def train_on(self, unit: int, rate: float) -> None:
        """See :class:`Training`."""
        start = time.monotonic()
        super().train_on(unit, rate)
        if self.fails:
            time.sleep((SLOWER - 1) * (time.monotonic() - start))


class Killed(Measured):
    """One worker is killed, once."""

    def train_on(self, unit: int, rate: float) -> None:
        """See :class:`Training`."""
        marker = _beside(self.work, "killed")
        if self.fails and self.share_of(unit) >= _DEATH and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().train_on(unit, rate)


class Garbage(Measured):
    """For some steps one worker's windows are random tokens, and its loss is far too large.

    Random tokens alone do no harm: a mask's gradients on them are no larger than on text.
    """

    def strikes(self, unit: int) -> bool:
        """Whether the fault does."""
        return self.fails and _SPIKE[0] <= self.share_of(unit) < _SPIKE[1]

    def train_on(self, unit: int, rate: float) -> None:
        """See :class:`Training`."""
        super().train_on(unit, rate)
        if self.strikes(unit):
            for router in self.model.routers.values():
                if router.grad is not None:
                    router.grad *= LOUDER

    def windows_of(self, unit: int) -> Tensor:
        """See :class:`Training`."""
        windows = super().windows_of(unit)
        if not self.strikes(unit):
            return windows
        generator = torch.Generator().manual_seed(unit)
        vocabulary = int(self.plan.config.get_text_config().vocab_size)
        return torch.randint(vocabulary, tuple(windows.shape), generator=generator)


FAULTS: dict[str, type[Measured]] = {
    "none": Measured,
    "slow": Slow,
    "killed": Killed,
    "garbage": Garbage,
}


def measure_edit(
    *, seeds: int, steps: int, sync_seconds: float, knob: float, console: Console
) -> dict[str, Any]:
    """Train with every method and fault, one after the other on the same workers.

    Args:
        seeds: of the order of windows, from 0; faults strike the first alone.
        steps: of a training.
        sync_seconds: of A-EDiT between two meetings.
        knob: weight of the penalty.
        console: where progress goes.

    Returns:
        Content of a result file: ``rows``, and ``summary`` over seeds.
    """
    cases = [(m, fault, 0) for fault in FAULTS for m in METHODS]
    cases += [(m, "none", seed) for seed in range(1, seeds) for m in METHODS]
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for method, fault, seed in cases:
            settings = TrainSettings(
                str(assets.MODEL),
                str(assets.CALIBRATION),
                knobs=(knob,),
                steps=steps,
                batch=4,
                length=64,
                seed=seed,
                workers=WORKERS,
                sync=method,
                sync_every=SYNC_EVERY,
                sync_seconds=sync_seconds,
            )
            out = Path(folder, f"{method}-{fault}-{seed}")
            plan = prepare_training(settings, out)
            jobs.append(Job(plan, WorkFolder(out, plan.identity()), FAULTS[fault]))
        train_on_ray(jobs, console=console)
        rows = [_row(*case, job) for case, job in zip(cases, jobs, strict=True)]
    return {
        "model": "demo",
        "steps": steps,
        "knob": knob,
        "sync_every": SYNC_EVERY,
        "sync_seconds": sync_seconds,
        "slower": SLOWER,
        "louder": LOUDER,
        "rows": rows,
        "summary": _summary(rows),
    }


def _row(method: str, fault: str, seed: int, job: Job) -> dict[str, Any]:
    """What a training came to."""
    state, settings = job.work.load(), job.plan.settings
    last = state.history[-1]
    about = json.loads(_beside(job.work, "json").read_text())
    return {
        "method": method,
        "workers": WORKERS,
        "fault": fault,
        "seed": seed,
        "tokens": last["tokens"],
        "validation_kl": last["kl_mean"],
        "experts_kept": last["experts_kept"],
        "objective": round(last["kl_mean"] + settings.knobs[0] * last["experts_kept"], 6),
        "bytes_per_step": round(last["bytes_sent"] / settings.steps),
        "left_out": about["left_out"],
        # of a training that was started again only what came after that
        "seconds": None if fault == "killed" else round(about["seconds"], 2),
    }


def _beside(work: WorkFolder, ending: str) -> Path:
    """A file beside a training's folder, which holds nothing but its state."""
    return work.path.with_name(f"{work.path.name}.{ending}")


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds, least and greatest, of each method and fault."""
    found = []
    for method in METHODS:
        for fault in FAULTS:
            own = [row for row in rows if (row["method"], row["fault"]) == (method, fault)]
            entry: dict[str, Any] = {"method": method, "fault": fault}
            for field in ("validation_kl", "experts_kept", "objective"):
                values = [row[field] for row in own]
                entry[field] = round(statistics.mean(values), 6)
                entry[f"{field}_range"] = [min(values), max(values)]
            found.append(entry)
    return found
