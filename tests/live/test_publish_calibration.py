"""A calibration that ends in a running deployment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sere_ray import assets
from sere_ray.util.files import file_sha256
from tests.serve.deployment import ADMIN

pytestmark = pytest.mark.engine


def calibrate(out, url, token):
    """Run `sere-ray calibrate` on a little of the demo's text, then publish."""
    what = [str(assets.MODEL), "--data", str(assets.CALIBRATION), "--out", str(out)]
    how = ["--sequences", "16", "--length", "64", "--publish", url]
    return subprocess.run(
        [sys.executable, "-m", "sere_ray", "calibrate", *what, *how],
        env={**os.environ, "SERE_ADMIN_TOKEN": token},
        capture_output=True,
        text=True,
        check=False,
    )


def test_published_artifact_is_the_one_that_runs(live):
    before = live.sere("artifact")
    out = Path(live.log).parent / "fresh.safetensors"  # the deployment's folder of artifacts
    try:
        done = calibrate(out, live.url, ADMIN)
        assert done.returncode == 0, done.stderr
        running = live.sere("artifact")
        assert running["name"].endswith("fresh.safetensors")
        assert running["sha256"] == file_sha256(out)
        assert f"runs {running['name']}, sha256 {running['sha256']}" in done.stderr
    finally:
        live.sere("artifact", {"name": Path(before["name"]).name})
        out.unlink(missing_ok=True)
    assert live.sere("artifact")["sha256"] == before["sha256"]


def test_a_wrong_token_is_refused_before_the_work(live, tmp_path):
    done = calibrate(tmp_path / "a.safetensors", live.url, "wrong")
    assert done.returncode == 2
    assert "/sere/artifact: 40" in done.stderr
    assert list(tmp_path.iterdir()) == []
