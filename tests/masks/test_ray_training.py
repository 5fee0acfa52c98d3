"""Training on Ray: two workers, one of which is killed, train the masks of one process."""

import dataclasses
import io
import os
import signal

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from rich.console import Console

from sere_ray.calibration.ray_job import STORE_BYTES
from sere_ray.masks.plan import TrainSettings, prepare_training
from sere_ray.masks.ray_training import Job, _reason, train_on_ray
from sere_ray.masks.train import artifact_of, train_masks
from sere_ray.masks.training import Training
from sere_ray.masks.work_folder import WorkFolder
from sere_ray.util.errors import SereError
from sere_ray.util.ray_instance import start_ray
from tests.masks.conftest import SMALL
from tests.masks.test_workers import check_equal_but_rounding

ONE = TrainSettings(**{**SMALL, "batch": 4})
TWO = dataclasses.replace(ONE, workers=2)


class KilledOnce(Training):
    """The second worker dies in the second level."""

    save_seconds = -1.0

    def train_on(self, unit, rate):
        marker = self.work.path.with_name("killed")
        if self.exchange.rank == 1 and self.state.level == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().train_on(unit, rate)


class OutOfMemory(Training):
    def train_on(self, unit, rate):
        def full(windows):
            raise torch.OutOfMemoryError

        if self.exchange.rank == 1:
            self.model._exact = full
        super().train_on(unit, rate)


@pytest.fixture(scope="module")
def _ray():
    start_ray(num_cpus=2, object_store_memory=STORE_BYTES)
    yield
    ray.shutdown()


def job(path, settings, training):
    plan = prepare_training(settings, path)
    return Job(plan, WorkFolder(path.with_name(f"{path.name}.work"), plan.identity()), training)


@pytest.mark.usefixtures("_ray")
def test_a_killed_worker_and_one_that_cannot_go_on(tmp_path, has_words):
    """In one run of Ray Train: the first training ends as in one process, the second is refused."""
    expected = train_masks(ONE, tmp_path / "one").artifact
    killed = job(tmp_path / "two", TWO, KilledOnce)
    hungry = job(tmp_path / "hungry", TWO, OutOfMemory)
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(SereError) as caught:
        train_on_ray([killed, hungry], console=console)
    assert str(caught.value).startswith("--batch-size = 8: the device has not memory enough")
    assert (tmp_path / "killed").exists()
    state = killed.work.load()
    assert not state.ahead
    found = artifact_of(killed.plan, state)
    for level, of_level in expected.weights.items():
        for layer, weight in of_level.items():
            check_equal_but_rounding(found.weights[level][layer], weight)
    has_words(console.file.getvalue(), "level 2, step 8: KL", "slots by layer", "of 32 steps")


@pytest.mark.usefixtures("_ray")
def test_too_few_cores(tmp_path):
    settings = dataclasses.replace(ONE, workers=4, batch_size=16, validation=16)
    with pytest.raises(SereError, match="--workers = 4: each takes a CPU, but the Ray cluster has"):
        train_masks(settings, tmp_path / "masks")
    assert list(tmp_path.iterdir()) == []


def test_the_reason_of_an_end(tmp_path):
    work = WorkFolder(tmp_path / "work", {})
    dead = WorkerHealthCheckFailedError("a worker", ActorDiedError())
    reset = RuntimeError("connection closed by peer")
    assert _reason(WorkerGroupError("two", {0: reset, 1: dead}), work) == (
        "workers died 3 times; if memory ran out, give fewer --workers or a smaller --batch-size. "
        f"{tmp_path / 'work'} has what is done: the same command goes on from there"
    )
    assert _reason(WorkerGroupError("one", {0: reset}), work).startswith(
        "a worker failed (connection closed by peer). "
    )
