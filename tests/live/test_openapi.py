"""The control API against its own document: schemathesis, with all its checks."""

import subprocess
import sys
import time

import pytest

from tests.serve.deployment import ADMIN

pytestmark = pytest.mark.engine
CONFIG = """
[checks.positive_data_acceptance]
# A change may have the form of the document and not fit the model, or the rule that runs.
expected-statuses = ["2xx", 422]
"""


def test_schemathesis_finds_nothing(live, tmp_path):
    before, artifact = live.sere("policy"), live.sere("artifact")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    command += ["run", f"{live.url}/sere/openapi.json", "--max-examples", "15", "--seed", "1"]
    command += ["--header", f"Authorization: Bearer {ADMIN}", "--continue-on-failure"]
    command += ["--request-timeout", "15", "--max-time", "30", "--phases", "coverage,fuzzing"]
    try:
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False
        )
        print(done.stdout[-1500:])
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert "Tested: 6" in done.stdout
        assert ADMIN not in done.stdout
    finally:
        wait_until_quiet(live)
        restore = {k: v for k, v in before["policy"].items() if k != "similarity"}
        live.sere("policy", restore)
    after = live.sere("policy")
    assert (after["mode"], after["policy"]) == (before["mode"], before["policy"])
    assert live.sere("artifact") == artifact
    assert live.complete(max_tokens=4)[0] == 200
    assert after["replicas_settled"] == 2


def wait_until_quiet(live):
    """A request that schemathesis gave up at its time limit may still change something."""
    versions = [-1]
    while live.sere("policy")["version"] != versions[-1]:
        versions.append(live.sere("policy")["version"])
        time.sleep(1)


def test_the_document_says_who_may_ask_and_what_is_counted(live):
    document = live.sere("openapi.json")
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path in document["paths"].values():
        for operation in path.values():
            assert operation["security"]
            assert {"401", "403", "413", "422", "429", "503"} <= set(operation["responses"])
    sums = document["components"]["schemas"]["StepSums"]["properties"]
    assert all("description" in field for field in sums.values())
    change = document["paths"]["/policy"]["put"]["requestBody"]["content"]["application/json"]
    assert "auto" in str(change["schema"])
