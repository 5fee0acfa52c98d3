"""``sere-ray train-masks``: levels of masks, one after the other, in one process."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sere_ray.artifact.gates import router_fingerprint
from sere_ray.calibration.loading import load_model, model_name, pick_device, pick_dtype
from sere_ray.calibration.plan import only_writer
from sere_ray.masks.artifact import Level, MasksArtifact, MasksMetadata
from sere_ray.masks.frozen_model import FrozenModel, Validation
from sere_ray.masks.plan import TrainPlan, TrainSettings, prepare_training
from sere_ray.masks.work_folder import State, WorkFolder
from sere_ray.util.progress import progress
from sere_ray.util.results import CALIBRATION_LIBRARIES, library_versions

VALIDATIONS = 4
"""Of a level, evenly spaced; the last one is at its end."""
_SAVE_SECONDS = 10.0
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Trained:
    """What training made, beside the file."""

    artifact: MasksArtifact
    history: list[dict[str, Any]]
    """What validation said: rows of a result file."""
    seconds: float
    """Of this process; a job that went on does not count what was done before."""
    processor_seconds: float
    """The same in time of its processors, which other work on the machine does not lengthen."""


def train_masks(settings: TrainSettings, out: Path, console: Console | None = None) -> Trained:
    """Train masks on a frozen model and write their file.

    ``OUT.work`` says how far it is; started again with the same settings it goes on from there, to
    the same masks. The file appears whole or not at all, and the folder is gone then.

    Args:
        settings: what is trained on what.
        out: the file; an existing one is replaced.
        console: where progress goes; None = nowhere.

    Raises:
        SereError: something cannot be used; says why.
    """
    start, processor = time.monotonic(), time.process_time()
    pick_device(settings.device)  # refuses what this machine lacks
    plan = prepare_training(settings, out)
    work = WorkFolder(out.with_name(f"{out.name}.work"), plan.identity())
    with only_writer(out):
        state = work.load()
        training = _Training(plan, state, work, console)
        training.run()
        artifact = training.artifact()
        artifact.save(out)
        work.remove()
    seconds = time.monotonic() - start
    return Trained(artifact, state.history, seconds, time.process_time() - processor)


class _Training:
    """The frozen model, its optimizer, and the state that is saved."""

    def __init__(
        self, plan: TrainPlan, state: State, work: WorkFolder, console: Console | None
    ) -> None:
        self.plan, self.state, self.work, self.console = plan, state, work, console
        settings = plan.settings
        device = pick_device(settings.device)
        dtype = pick_dtype(settings.dtype, device, plan.config)
        loaded = load_model(settings.model, revision=plan.revision, device=device, dtype=dtype)
        self.model = FrozenModel(loaded, settings)
        self.saved = time.monotonic()
        self.optimizer = self._new_optimizer()
        self._restore()

    def run(self) -> None:
        """Train what is left."""
        settings, state = self.plan.settings, self.state
        levels = len(settings.knobs)
        total = levels * settings.steps
        with progress(self.console, total, task="train masks", unit="steps") as advance:
            advance(state.level * settings.steps + state.step)
            while state.level < levels:
                self._level(advance)
                self._end_level()

    def artifact(self) -> MasksArtifact:
        """The levels as a file."""
        plan, settings = self.plan, self.plan.settings
        weights = {
            level: self._tensors(f"done.{level - 1}") for level in range(1, len(settings.knobs) + 1)
        }
        ends = [row for row in self.state.history if row["step"] == settings.steps]
        return MasksArtifact(
            weights,
            MasksMetadata(
                model_id=model_name(settings.model),
                revision=plan.revision,
                num_experts=plan.shape.num_experts,
                top_k=plan.shape.top_k,
                router_fingerprint={
                    index: router_fingerprint(layer.gate_weight)
                    for index, layer in self.model.layers.items()
                },
                levels=[Level(**{name: row[name] for name in Level.model_fields}) for row in ends],
                keep_first=settings.keep_first,
                penalty=settings.penalty,
                batch=settings.batch,
                balance=settings.balance,
                tokens=settings.steps * settings.batch_size * settings.length,
                dataset=plan.source.name,
                dataset_revision=plan.source.revision,
                dataset_sha256=plan.source.sha256,
                libraries=library_versions(CALIBRATION_LIBRARIES),
                date=datetime.now(UTC).isoformat(timespec="seconds"),
            ),
        )

    def _level(self, advance: Callable[[int], None]) -> None:
        """The steps of a level that are left."""
        settings, state = self.plan.settings, self.state
        every = max(1, settings.steps // VALIDATIONS)
        while state.step < settings.steps:
            self.optimizer.zero_grad(set_to_none=True)
            self.model.add_gradients(
                self.plan.windows_of(state.level, state.step), settings.knobs[state.level]
            )
            for group in self.optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1 - state.step / settings.steps)
            self.optimizer.step()
            state.step += 1
            advance(1)
            left = settings.steps - state.step
            if left == 0 or (state.step % every == 0 and left >= every):
                self._validate()
            if time.monotonic() - self.saved > _SAVE_SECONDS:
                self._save()

    def _end_level(self) -> None:
        state = self.state
        for index, weight in self.model.copy_of_routers().items():
            state.tensors[f"done.{state.level}.{index}"] = weight
        state.level, state.step = state.level + 1, 0
        self.optimizer = self._new_optimizer()
        self._save()

    def _validate(self) -> None:
        """Take down, and tell, what the masks give now."""
        found = self.model.validate(self.plan.validation)
        self.state.history.append(self._row(found))
        if self.console is not None:
            kept = " ".join(f"{share:.0%}" for share in found.slots_kept.values())
            self.console.print(
                f"level {self.state.level + 1}, step {self.state.step}: KL {found.kl_mean:.4f}, "
                f"slots kept {found.slots_mean:.0%}, experts of a batch {found.experts_mean:.0%}; "
                f"slots by layer {kept}",
                highlight=False,
                soft_wrap=True,
            )

    def _row(self, found: Validation) -> dict[str, Any]:
        settings, state = self.plan.settings, self.state
        return {
            "level": state.level + 1,
            "knob": settings.knobs[state.level],
            "step": state.step,
            "tokens": state.step * settings.batch_size * settings.length,
            "kl_mean": round(found.kl_mean, 6),
            "slots_kept": round(found.slots_mean, 5),
            "experts_kept": round(found.experts_mean, 5),
            "slots_kept_by_layer": [round(share, 4) for share in found.slots_kept.values()],
            "experts_kept_by_layer": [round(share, 4) for share in found.experts_kept.values()],
        }

    def _new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.model.routers.values(), lr=self.plan.settings.learning_rate)

    def _save(self) -> None:
        """Write routers and moments of this level beside what is done."""
        state = self.state
        done = {name: t for name, t in state.tensors.items() if name.startswith("done.")}
        now = {f"now.{i}": weight for i, weight in self.model.copy_of_routers().items()}
        for index, router in self.model.routers.items():
            of_router = self.optimizer.state.get(router, {})
            now |= {f"{name}.{index}": of_router[name].cpu() for name in _MOMENTS if of_router}
        state.tensors = done | now
        self.work.save(state)
        self.saved = time.monotonic()

    def _restore(self) -> None:
        """Go on from the state, if it is not a new one."""
        if not self.state.tensors:
            return
        self.model.set_routers(self._tensors("now"))
        if not self.state.step:
            return
        moments = {name: self._tensors(name) for name in _MOMENTS}
        for index, router in self.model.routers.items():
            self.optimizer.state[router] = {
                "step": torch.tensor(float(self.state.step)),
                **{name: moments[name][index].to(router.device) for name in _MOMENTS},
            }

    def _tensors(self, prefix: str) -> dict[int, Tensor]:
        """Of the state, those of every layer under a prefix."""
        return {index: self.state.tensors[f"{prefix}.{index}"] for index in self.model.layers}
