"""The job on Ray: same result for any number of workers, whoever dies; what it refuses."""

import dataclasses
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from rich.console import Console

from sere_ray import assets
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.calibration import calibrate, ray_job
from sere_ray.calibration.plan import CalibrationSettings, only_writer, prepare
from sere_ray.calibration.ray_job import (
    STORE_BYTES,
    ShardWorker,
    calibrate_on_ray,
    cut,
)
from sere_ray.calibration.similarity import make_sums
from sere_ray.calibration.work_folder import Partial, WorkFolder
from sere_ray.util.errors import ArtifactError, DataError, SereError
from sere_ray.util.ray_instance import start_ray

SETTINGS = CalibrationSettings(
    str(assets.MODEL),
    str(assets.CALIBRATION),
    sequences=150,
    batch_size=16,
    statistics=("stand_ins", "novices"),
)
SHARDS = 5


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    start_ray(num_cpus=3, object_store_memory=STORE_BYTES)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> SimilarityArtifact:
    """What one process gives."""
    out = tmp_path_factory.mktemp("one") / "a"
    return calibrate(**dataclasses.asdict(SETTINGS), out=out)


def check_equal(found: SimilarityArtifact, expected: SimilarityArtifact) -> None:
    """Every token once, every number within 1e-6."""
    assert found.metadata.tokens == expected.metadata.tokens
    assert found.metadata.router_fingerprint == expected.metadata.router_fingerprint
    assert sorted(found.layers) == sorted(expected.layers)
    for index, matrix in expected.layers.items():
        torch.testing.assert_close(found.layers[index], matrix, atol=1e-6, rtol=0)
        assert found.statistics[index].keys() == expected.statistics[index].keys()
        for name, tensor in expected.statistics[index].items():
            torch.testing.assert_close(found.statistics[index][name], tensor, atol=1e-6, rtol=1e-6)


def job(tmp_path: Path, **options: object) -> tuple[SimilarityArtifact, str]:
    """The artifact and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    artifact = calibrate_on_ray(SETTINGS, out=tmp_path / "a", console=console, **options)  # type: ignore[arg-type]
    return artifact, console.file.getvalue()  # type: ignore[attr-defined]


class Killer:
    """Kills model workers once the first shard is done: ``times`` of them, each when it appears."""

    def __init__(self, work: Path, times: int) -> None:
        self.work, self.times = work, times
        self.killed: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while len(self.killed) < self.times and not self._stop.wait(0.02):
            if not list(self.work.glob("shard-*")):
                continue
            for process in psutil.Process().children(recursive=True):
                try:
                    is_worker = process.cmdline()[:1] and "MapWorker" in process.cmdline()[0]
                    if is_worker and process.pid not in self.killed:
                        process.kill()
                        self.killed.add(process.pid)
                        break
                except psutil.Error:
                    continue


@pytest.mark.usefixtures("_ray")
def test_the_number_of_workers_changes_nothing(
    tmp_path: Path, expected: SimilarityArtifact
) -> None:
    found = [job(tmp_path, workers=count)[0] for count in (1, 2, 3)]
    check_equal(found[0], expected)
    for other in found[1:]:
        for index, matrix in found[0].layers.items():
            assert torch.equal(other.layers[index], matrix)
            for name, tensor in found[0].statistics[index].items():
                assert torch.equal(other.statistics[index][name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.usefixtures("_ray")
def test_a_killed_worker_is_replaced_and_its_shard_counts_once(
    tmp_path: Path, expected: SimilarityArtifact
) -> None:
    with Killer(tmp_path / "a.work", times=1) as killer:
        found, _ = job(tmp_path, workers=1)
    assert len(killer.killed) == 1
    check_equal(found, expected)


@pytest.mark.usefixtures("_ray")
def test_a_worker_that_keeps_dying_ends_the_job_and_the_same_command_goes_on(
    tmp_path: Path, expected: SimilarityArtifact
) -> None:
    with Killer(tmp_path / "a.work", times=100) as killer, pytest.raises(SereError) as caught:
        job(tmp_path, workers=1)
    assert len(killer.killed) == 3
    assert str(caught.value).startswith("a worker died 3 times; if memory ran out, give fewer")
    assert "the same command goes on from there" in str(caught.value)
    assert not (tmp_path / "a").exists()
    done = len(list((tmp_path / "a.work").glob("shard-*")))
    assert 1 <= done < SHARDS
    found, printed = job(tmp_path, workers=1)
    assert f"resuming: {done} of {SHARDS} shards are done" in printed
    check_equal(found, expected)


@pytest.mark.usefixtures("_ray")
def test_a_killed_job_goes_on_where_it_was(tmp_path: Path, expected: SimilarityArtifact) -> None:
    work = tmp_path / "a.work"
    options = ["--out", str(tmp_path / "a"), "--sequences", "150", "--ray", "--workers", "1"]
    options += ["--statistics", ",".join(SETTINGS.statistics)]
    command = [sys.executable, "-m", "sere_ray", "calibrate", SETTINGS.model, *options]
    process = subprocess.Popen(
        [*command, "--data", SETTINGS.data], stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not list(work.glob("shard-*")):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in started:  # Ray's own reaper takes a while
            with suppress(psutil.NoSuchProcess):
                child.kill()
    done = len(list(work.glob("shard-*")))
    assert 1 <= done <= SHARDS
    found, printed = job(tmp_path, workers=2)
    assert f"resuming: {done} of {SHARDS} shards are done" in printed
    check_equal(found, expected)


class HungryWorker(ShardWorker):
    """A worker that asks for more memory than there is when the last shard comes."""

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        if rows["shard"][0] == SHARDS - 1:
            torch.empty(2**46, dtype=torch.uint8)
        return super().__call__(rows)


@pytest.mark.usefixtures("_ray")
def test_a_worker_out_of_memory_ends_the_job_and_the_same_command_goes_on(
    tmp_path: Path, expected: SimilarityArtifact
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_job, "ShardWorker", HungryWorker)
        with pytest.raises(SereError, match="ran out of memory; give fewer --workers") as caught:
            job(tmp_path, workers=1)
    done = len(list((tmp_path / "a.work").glob("shard-*")))
    assert 1 <= done < SHARDS
    assert f"{done} shards are kept" in str(caught.value)
    assert not (tmp_path / "a").exists()
    found, printed = job(tmp_path, workers=1)
    assert f"resuming: {done} of {SHARDS} shards are done" in printed
    check_equal(found, expected)


def test_another_job_refuses_the_folder(tmp_path: Path) -> None:
    plan = prepare(SETTINGS, tmp_path / "a")
    work = tmp_path / "work"
    WorkFolder(work, plan, cut(plan))
    WorkFolder(work, plan, cut(plan))
    changes = [{"metric": "cosine"}, {"dtype": "bfloat16"}, {"sequences": 20}, {"statistics": ()}]
    for change in changes:
        other = prepare(dataclasses.replace(SETTINGS, **change), tmp_path / "a")  # type: ignore[arg-type]
        (name,) = change
        with pytest.raises(SereError, match=rf"holds sums of a job with {name} = .*remove the fol"):
            WorkFolder(work, other, cut(other))
    same = prepare(dataclasses.replace(SETTINGS, batch_size=3), tmp_path / "a")
    assert WorkFolder(work, same, cut(same)).done() == set()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(SereError, match="is not empty and no job's"):
        WorkFolder(tmp_path / "mine", plan, cut(plan))


def test_sums_of_another_dtype_are_not_added(tmp_path: Path) -> None:
    """A job begun on GPUs and gone on with on CPUs; or shards that got there all the same."""
    plan = prepare(SETTINGS, tmp_path / "a")
    folder = WorkFolder(tmp_path / "work", plan, cut(plan))

    def partial(dtype: str) -> Partial:
        sums = {i: make_sums("frobenius", plan.shape.num_experts) for i in plan.shape.layers}
        return Partial(sums, dict.fromkeys(plan.shape.layers, ""), dtype)

    folder.save(0, partial("bfloat16"))
    with pytest.raises(
        SereError, match=r"in bfloat16, these are of one in float32.*--dtype bfloat"
    ):
        folder.save(1, partial("float32"))
    assert folder.done() == {0}
    other = WorkFolder(tmp_path / "other", plan, cut(plan))
    other.save(1, partial("float32"))
    shutil.copy(other.path / "shard-00001.safetensors", folder.path)
    with pytest.raises(SereError, match="in bfloat16, these are of one in float32"):
        folder.merged()


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    plan = prepare(SETTINGS, tmp_path / "a")
    folder = WorkFolder(tmp_path / "work", plan, cut(plan))
    (tmp_path / "work" / "shard-00000.safetensors").write_bytes(b"x")
    with pytest.raises(SereError, match=r"shard-00000\.safetensors: damaged .*start the job again"):
        folder.merged()


def test_two_jobs_that_write_one_file_are_refused(tmp_path: Path) -> None:
    with only_writer(tmp_path / "a"):
        message = f"process {os.getpid()} on .* is writing this file; wait for it"
        with pytest.raises(ArtifactError, match=message):
            job(tmp_path)
        with pytest.raises(ArtifactError, match=message):
            calibrate(**dataclasses.asdict(SETTINGS), out=tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text_column": "body"}, DataError, "no column 'body'"),
        ({"sequences": 10**6}, DataError, "sequences = 1000000; give more text"),
        ({"metric": "cka-exact"}, SereError, "is for one process; use 'cka' with --ray"),
        ({"batch_size": 0}, DataError, "batch_size = 0: must be at least 1"),
    ],
)
def test_bad_settings_are_refused_before_ray_starts(
    change: dict[str, object], error: type[SereError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        calibrate_on_ray(
            dataclasses.replace(SETTINGS, **change),  # type: ignore[arg-type]
            out=tmp_path / "a",
            address="nowhere:1",
            console=Console(file=io.StringIO()),
        )
    assert list(tmp_path.iterdir()) == []


def test_job_file_runs_from_its_own_folder_as_a_cluster_starts_it(tmp_path: Path) -> None:
    repository = Path(__file__).parents[2]
    data = ["--data", SETTINGS.data, "--out", str(tmp_path / "no" / "a")]
    done = subprocess.run(
        [sys.executable, "job.py", SETTINGS.model, *data],
        cwd=repository / "calibration",
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "the folder does not exist; create it" in done.stderr
