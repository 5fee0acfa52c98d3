"""What a stranger with only the wheel and its constraints gets: an empty environment that runs.

Takes minutes and 4 GB of disk, so it runs at night: `pytest -m nightly tests/test_install.py`.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from sere_ray.util.ports import free_port

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]
CONSTRAINTS = "sere_ray/examples/constraints"


def environment(folder):
    """Nothing of the environment that runs this test: no PYTHONPATH, no activated venv."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "PATH": f"{folder / 'bin'}:/usr/local/bin:/usr/bin:/bin"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel_path):
    """Runs a command in an environment with the wheel's own constraints, then the wheel."""
    base = tmp_path_factory.mktemp("install")
    folder, work = base / "venv", base / "work"
    work.mkdir()
    venv.create(folder, with_pip=True, symlinks=True)
    with zipfile.ZipFile(wheel_path) as wheel:
        members = (f"{CONSTRAINTS}/cpu.txt", f"{CONSTRAINTS}/install_cpu.py")
        wheel.extractall(base, members)

    def run(*words, check=True, timeout=1500):
        done = subprocess.run(
            [*map(str, words)],
            cwd=work,
            env=environment(folder),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    pip = (folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-cache-dir")
    run(folder / "bin" / "python", base / CONSTRAINTS / "install_cpu.py")  # as the Makefile does
    run(*pip, "--no-deps", wheel_path)
    yield run
    shutil.rmtree(folder)


def test_the_wheel_runs_and_not_the_clone(installed):
    program = "import sere_ray, sys; print(sere_ray.__file__); print(sys.prefix)"
    file, prefix = installed("python", "-c", program).stdout.split()
    assert Path(file).is_relative_to(prefix)
    assert not Path(prefix).is_relative_to(sys.prefix)


def test_examples_are_copied_and_the_copied_model_calibrated(installed, tmp_path):
    assert "deploy/one-gpu.yaml" in installed("sere-ray", "examples").stdout
    out = tmp_path / "mine"
    installed("sere-ray", "examples", "--out", out)
    similarity = tmp_path / "demo.safetensors"
    data = ("--data", out / "demo" / "data" / "calibration.jsonl")
    few = ("--sequences", 8, "--length", 32)
    installed("sere-ray", "calibrate", out / "demo" / "model", *data, "--out", similarity, *few)
    assert similarity.is_file()


def test_the_demo_runs(installed, tmp_path):
    out = tmp_path / "demo.json"
    done = installed("sere-ray", "demo", "--json", out, "--port", free_port(), "--concurrency", 4)
    assert "Traceback" not in done.stdout + done.stderr
    exact, *rerouted = json.loads(out.read_text())["runs"]
    assert exact["policy"] == "stock"
    assert exact["accuracy"] > 0.9  # answers come from the model, not from noise
    assert rerouted
    assert all(run["experts_read"] < exact["experts_read"] for run in rerouted)
