"""`sere-ray compare` on a real deployment: texts of a re-routed model beside the exact one's."""

import os
import subprocess
import sys

import pytest

from sere_ray.util.results import load_result
from tests.serve.deployment import ADMIN, API_KEY

pytestmark = pytest.mark.engine


def test_compare_asks_the_deployment_under_each_policy(live, tmp_path):
    out, before = tmp_path / "compare.json", live.sere("policy")["policy"]
    policies = "S=4,S=1:min_primary_experts=0"
    command = [sys.executable, "-m", "sere_ray", "compare", live.url, "--tasks", "long"]
    command += ["--policies", policies, "--items", "8", "--max-tokens", "48", "--out", str(out)]
    environment = {**os.environ, "SERE_ADMIN_TOKEN": ADMIN, "OPENAI_API_KEY": API_KEY}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = {(row["policy"], row["scored_by"]): row for row in load_result(out)["rows"]}
    same, changed = (rows[name, "sound, 48 tokens at most"] for name in policies.split(","))
    assert same["items"] == changed["items"] == 8
    assert same["right"] == same["right_exact"] > 0
    assert same["repetition_change"] == 0, "S = K changes nothing"
    assert changed["experts_read"] < same["experts_read"]
    assert changed["repetition_change"] != 0, "other texts"
    assert live.sere("policy")["policy"] == before
