"""The image's health check against a running deployment."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine
SCRIPT = Path(__file__).parents[2] / "deploy" / "healthcheck.sh"


def test_the_health_check_passes_without_a_key(live):
    if shutil.which("wget") is None:
        pytest.skip("the health check calls wget: apt install wget")
    port = live.url.rpartition(":")[2]
    assert subprocess.run([str(SCRIPT), port], timeout=20, check=False).returncode == 0
