"""The image's health check against a running deployment."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serve.deployment import wait_for

pytestmark = pytest.mark.engine
SCRIPT = Path(__file__).parents[2] / "deploy" / "healthcheck.sh"


def test_the_health_check_passes_without_a_key(live):
    if shutil.which("wget") is None:
        pytest.skip("the health check calls wget: apt install wget")
    port = live.url.rpartition(":")[2]
    command = [str(SCRIPT), port]
    wait_for(lambda: subprocess.run(command, check=False).returncode == 0, 30, "health")
