"""`ray job submit` of calibration/job.py, as docs/quality.md has it, on a local cluster."""

import dataclasses
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from sere_ray import assets
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.bench.servers import server
from sere_ray.calibration.plan import CalibrationSettings, prepare, write_artifact
from sere_ray.calibration.ray_job import STORE_BYTES, ShardWorker, _partial, cut
from sere_ray.calibration.work_folder import WorkFolder
from sere_ray.util.files import file_sha256
from sere_ray.util.ports import free_port

REPOSITORY = Path(__file__).parents[2]
RAY = ["-m", "ray.scripts.scripts"]
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # a job runs `python`
    "PYTHONPATH": str(REPOSITORY),
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
}
SETTINGS = CalibrationSettings(
    str(assets.MODEL), str(assets.CALIBRATION), sequences=96, batch_size=16
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of the job server of a head node with two cores."""
    dashboard = free_port()
    # Sockets need a short path, and what Ray started last may still write into it.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log"
        options = {
            "port": 0,
            "node-ip-address": "127.0.0.1",
            "num-cpus": 2,
            "object-store-memory": STORE_BYTES,
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": free_port(),
            "ray-client-server-port": free_port(),
            "temp-dir": folder,
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        command = [*RAY, "start", "--head", "--block", "--disable-usage-stats", *flags]
        with server(command, log, lambda: "Ray runtime" in log.read_text(), ENVIRONMENT) as head:
            yield f"http://127.0.0.1:{dashboard}"
            end(head)


def end(head: subprocess.Popen[bytes]) -> None:
    """Kill it and what it started; asked politely, Ray takes half a minute."""
    started = psutil.Process(head.pid).children(recursive=True)
    head.kill()
    head.wait()
    for process in started:
        with suppress(psutil.NoSuchProcess):  # they end without their head, too
            process.kill()
    psutil.wait_procs(started)


def submit(cluster: str, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The documented command, until the job has ended."""
    address = ["--address", cluster, "--working-dir", "calibration"]
    data = [SETTINGS.model, "--data", SETTINGS.data, "--out", str(out)]
    return subprocess.run(
        [
            sys.executable,
            *RAY,
            "job",
            "submit",
            *address,
            "--",
            "python",
            "job.py",
            *data,
            *options,
        ],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )


def local(out: Path) -> SimilarityArtifact:
    """The same shards, one after the other in this process."""
    plan = prepare(SETTINGS, out)
    shards = cut(plan)
    folder = WorkFolder(out.with_name("work"), plan, shards)
    worker = ShardWorker(SETTINGS, plan.config, plan.revision, plan.pad_id, on_gpu=False)
    for number, windows in enumerate(shards):
        folder.save(number, _partial(plan, worker({"shard": [number], "windows": [windows]})))
    total = folder.merged()
    return write_artifact(plan, out, total.sums, total.fingerprints)


def test_a_submitted_job_writes_what_a_local_calibration_writes(
    cluster: str, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    done = submit(cluster, out, "--sequences", "96", "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"sha256 {file_sha256(out)}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    # All but the time of writing is the same, to the last bit.
    date = SimilarityArtifact.load(out).metadata.date
    expected = local(tmp_path / "local")
    metadata = expected.metadata.model_copy(update={"date": date})
    dataclasses.replace(expected, metadata=metadata).save(tmp_path / "expected")
    assert file_sha256(out) == file_sha256(tmp_path / "expected")


def test_a_refused_job_fails_with_its_message(cluster: str, tmp_path: Path) -> None:
    done = submit(cluster, tmp_path / "a", "--text-column", "body")
    assert done.returncode != 0
    assert "no column 'body'; it has 'text'" in done.stdout
    assert "Traceback" not in done.stdout
    assert list(tmp_path.iterdir()) == []
