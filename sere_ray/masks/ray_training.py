"""Training on Ray: Ray Train starts the workers, and starts all of them again if one dies.

They go on from the work folder then, which one process uses, too; so Ray's own checkpoints are
left unused.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from sere_ray.calibration.loading import load_model, pick_dtype
from sere_ray.calibration.ray_job import RETRIES, on_gpu, ray_for
from sere_ray.masks.exchange import Exchange
from sere_ray.masks.listener import Noted, Notes, on_console
from sere_ray.masks.plan import TrainPlan
from sere_ray.masks.training import Training
from sere_ray.masks.work_folder import RAY_FOLDER, WorkFolder
from sere_ray.util.errors import SereError
from sere_ray.util.progress import every

EXCHANGE_SECONDS = 1800
"""After which a worker gives up on the others: the slowest one's steps between two meetings."""
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """A training, and where it is saved: a folder that all workers reach."""

    plan: TrainPlan
    work: WorkFolder
    training: type[Training] = Training

    @property
    def steps(self) -> int:
        """Of all levels."""
        return len(self.plan.settings.knobs) * self.plan.settings.steps


def train_on_ray(
    jobs: Sequence[Job], *, address: str | None = None, console: Console | None
) -> None:
    """Run trainings of one model and as many workers, one after the other.

    Args:
        jobs: what is trained; what their folders have is not done again.
        address: of a running cluster, ``auto`` for the one of this machine; None: a Ray instance
            of our own.
        console: where progress goes; None = nowhere.

    Raises:
        SereError: there is no such cluster, it is too small, a worker cannot go on, or workers
            died more often than they are started again.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    settings = jobs[0].plan.settings
    with ray_for(address, settings.workers):
        gpus = on_gpu(settings.device, ray.cluster_resources())
        _check_size(settings.workers, "GPU" if gpus else "CPU", ray.cluster_resources())
        notes = ray.remote(num_cpus=0)(Notes).remote()
        trainer = TorchTrainer(
            _work,
            train_loop_config={"jobs": [_without_texts(job) for job in jobs], "notes": notes},
            scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=gpus),
            torch_config=TorchConfig(backend="gloo", timeout_s=EXCHANGE_SECONDS),
            run_config=RunConfig(
                name="workers",
                storage_path=str((jobs[0].work.path / RAY_FOLDER).absolute()),
                failure_config=FailureConfig(max_failures=RETRIES * len(jobs)),
            ),
        )
        try:
            with _shown(notes, jobs, console):
                trainer.fit()
        except TrainingFailedError as error:
            reason = ray.get(notes.refusal.remote()) or _reason(error, jobs[0].work)
            raise SereError(reason) from None
        if refused := ray.get(notes.refusal.remote()):
            raise SereError(refused)


def _work(config: dict[str, Any]) -> None:
    """What a worker runs, from the start or after one of them has died."""
    import ray
    from ray.train import get_context
    from ray.train.torch import get_device

    notes = config["notes"]
    if ray.get(notes.refusal.remote()):
        return  # they were started again because one of them cannot go on
    plan, device = config["jobs"][0].plan, get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)  # a worker has one core
    listener = Noted(notes) if get_context().get_world_rank() == 0 else None
    exchange = Exchange(torch.distributed.group.WORLD)
    try:
        dtype = pick_dtype(plan.settings.dtype, device, plan.config)
        model = load_model(plan.settings.model, revision=plan.revision, device=device, dtype=dtype)
        for job in config["jobs"]:
            state = job.work.load()
            job.training(job.plan, model, state, job.work, exchange, listener).run()
            if listener:
                listener.before += job.steps
    except SereError as error:
        ray.get(notes.refuse.remote(str(error)))
        raise


@contextmanager
def _shown(notes: Any, jobs: Sequence[Job], console: Console | None) -> Iterator[None]:
    """Show what workers say while the block runs."""
    import ray

    with on_console(console, sum(job.steps for job in jobs)) as listener:

        def look() -> None:
            steps, texts = ray.get(notes.take.remote())
            for text in texts:
                listener.say(text)
            if steps is not None:
                listener.at(steps)

        try:
            with every(_LOOK_SECONDS, look):
                yield
        finally:
            look()


def _without_texts(job: Job) -> Job:
    """A job that can be sent: its text has been read."""
    source = dataclasses.replace(job.plan.source, texts=iter(()))
    return dataclasses.replace(job, plan=dataclasses.replace(job.plan, source=source))


def _check_size(workers: int, resource: str, resources: dict[str, float]) -> None:
    """Refuse more workers than a cluster has room for, which would wait for ever.

    Raises:
        SereError: names both numbers.
    """
    found = int(resources.get(resource, 0))
    if workers > found:
        raise SereError(
            f"--workers = {workers}: each takes a {resource}, but the Ray cluster has {found}; "
            "give fewer"
        )


def _reason(error: Any, work: WorkFolder) -> str:
    """One message for what ended the workers, and how to go on."""
    from ray.exceptions import RayActorError

    causes = list(getattr(error, "worker_failures", {}).values()) or [error]
    died = [getattr(cause, "health_check_failure", None) for cause in causes]
    if any(isinstance(cause, RayActorError) for cause in died):
        # Ray cannot tell why: its text names all reasons there are
        what = (
            f"workers died {RETRIES + 1} times; if memory ran out, give fewer --workers or a "
            "smaller --batch-size"
        )
    else:
        what = f"a worker failed ({' '.join(str(causes[0]).split())[-300:]})"
    return f"{what}. {work.path} has what is done: the same command goes on from there"
