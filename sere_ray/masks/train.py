"""``sere-ray train-masks``: levels of masks on a frozen model, in one process or on Ray."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from sere_ray.calibration.loading import load_model, model_name, pick_device, pick_dtype
from sere_ray.calibration.plan import only_writer
from sere_ray.masks.artifact import Level, MasksArtifact, MasksMetadata
from sere_ray.masks.exchange import Exchange
from sere_ray.masks.listener import on_console
from sere_ray.masks.plan import TrainPlan, TrainSettings, prepare_training
from sere_ray.masks.ray_training import Job, train_on_ray
from sere_ray.masks.training import Training
from sere_ray.masks.work_folder import State, WorkFolder
from sere_ray.util.results import CALIBRATION_LIBRARIES, library_versions


@dataclass(frozen=True)
class Trained:
    """What training made, beside the file."""

    artifact: MasksArtifact
    history: list[dict[str, Any]]
    """What validation said: rows of a result file."""
    seconds: float
    """Of this process; a job that went on does not count what was done before."""
    processor_seconds: float
    """The same in time of its processors, which other work on the machine does not lengthen; not
    that of workers."""


def train_masks(
    settings: TrainSettings,
    out: Path,
    console: Console | None = None,
    *,
    address: str | None = None,
) -> Trained:
    """Train masks on a frozen model and write their file.

    ``OUT.work`` says how far it is; started again with the same settings it goes on from there, to
    the same masks. The file appears whole or not at all, and the folder is gone then.

    Args:
        settings: what is trained on what; several workers run on Ray.
        out: the file; an existing one is replaced. Workers reach its folder and the model.
        console: where progress goes; None = nowhere.
        address: of a running Ray cluster, ``auto`` for this machine's; None = one of our own.

    Raises:
        SereError: something cannot be used; says why.
    """
    start, processor = time.monotonic(), time.process_time()
    on_ray = settings.workers > 1 or address is not None
    if not on_ray:
        pick_device(settings.device)  # refuses what this machine lacks
    plan = prepare_training(settings, out)
    work = WorkFolder(out.with_name(f"{out.name}.work"), plan.identity())
    with only_writer(out):
        state = work.load()
        if on_ray:
            train_on_ray([Job(plan, work)], address=address, console=console)
            state = work.load()
        else:
            _train_here(plan, state, work, console)
        artifact = artifact_of(plan, state)
        artifact.save(out)
        work.remove()
    seconds = time.monotonic() - start
    return Trained(artifact, state.history, seconds, time.process_time() - processor)


def artifact_of(plan: TrainPlan, state: State) -> MasksArtifact:
    """The file of a training that has ended."""
    settings = plan.settings
    weights = {
        level: {i: state.tensors[f"done.{level - 1}.{i}"] for i in state.fingerprints}
        for level in range(1, len(settings.knobs) + 1)
    }
    ends = [row for row in state.history if row["step"] == settings.steps]
    return MasksArtifact(
        weights,
        MasksMetadata(
            model_id=model_name(settings.model),
            revision=plan.revision,
            num_experts=plan.shape.num_experts,
            top_k=plan.shape.top_k,
            router_fingerprint=state.fingerprints,
            levels=[Level(**{name: row[name] for name in Level.model_fields}) for row in ends],
            keep_first=settings.keep_first,
            penalty=settings.penalty,
            batch=settings.batch,
            balance=settings.balance,
            tokens=settings.steps * settings.batch_size * settings.length,
            dataset=plan.source.name,
            dataset_revision=plan.source.revision,
            dataset_sha256=plan.source.sha256,
            synthetic=False,
            libraries=library_versions(CALIBRATION_LIBRARIES),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
    )


def _train_here(plan: TrainPlan, state: State, work: WorkFolder, console: Console | None) -> None:
    """In this process."""
    settings = plan.settings
    total = len(settings.knobs) * settings.steps
    with on_console(console, total) as listener:
        Training(plan, _loaded(plan), state, work, Exchange(), listener).run()


def _loaded(plan: TrainPlan) -> PreTrainedModel:
    """The model on this machine's device."""
    settings = plan.settings
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device, plan.config)
    return load_model(settings.model, revision=plan.revision, device=device, dtype=dtype)
