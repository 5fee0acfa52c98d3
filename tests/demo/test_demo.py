"""`sere-ray demo --keep` as a user runs it: Ray Serve, a multi-process engine, the printed curl."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sere_ray.util.ports import free_port

pytestmark = pytest.mark.engine
FIELDS = {
    "rule",
    "select_top_k",
    "threshold",
    "concurrency",
    "experts_read",
    "step_ms",
    "tokens_per_s",
    "top1_agreement",
    "kl_mean",
    "accuracy",
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The demo at 8 streams, in short, left up: (process, output so far, folder)."""
    folder = tmp_path_factory.mktemp("demo")
    port = str(free_port())
    command = [str(Path(sys.executable).with_name("sere-ray")), "demo", "--keep", "--port", port]
    files = ["--json", str(folder / "demo.json"), "--html", str(folder / "demo.html")]
    log = folder / "log"
    # The engine tests set this for their own process; a user does not.
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *files, "--concurrency", "8", "--problems", "32", "--eager"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 500
        while "curl http" not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield process, log, folder
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_result_file(kept):
    document = json.loads((kept[2] / "demo.json").read_text())
    assert {"command", "machine", "versions", "commit", "date"} <= set(document)
    runs = document["runs"]
    assert [(run["rule"], run["select_top_k"], run["threshold"]) for run in runs] == [
        ("off", None, None),
        ("sere", 2, None),
        ("sere", 2, 0.3),
        ("sere", 1, None),
        ("sere", 1, 0.3),
    ]
    assert all(set(run) >= FIELDS for run in runs)
    stock, two, two_threshold, one, one_threshold = runs
    assert stock["top1_agreement"] == 1
    assert stock["kl_mean"] == 0
    assert stock["accuracy"] > 0.85
    assert one["experts_read"] < two["experts_read"] < stock["experts_read"]
    assert one["experts_read"] < one_threshold["experts_read"]
    assert two["experts_read"] < two_threshold["experts_read"]
    assert 0 < two["kl_mean"] < one["kl_mean"]


def test_page_is_self_contained(kept):
    page = (kept[2] / "demo.html").read_text()
    assert page.count("<img ") == 4
    assert not re.search(r"(src|href)=.?https?:", page)


def test_table_fits_a_terminal_and_shows_no_log_lines(kept):
    lines = kept[1].read_text().splitlines()
    rows = [line for line in lines if re.match(r" {1,2}(policy|stock|S=)", line)]
    assert len(rows) == 6
    assert all(len(line) <= 80 and "…" not in line for line in rows)
    assert not [line for line in lines if " INFO " in line or '"levelname"' in line]


def test_the_printed_curl_works_and_ctrl_c_ends_everything(kept):
    process, log, _ = kept
    line = next(line for line in log.read_text().splitlines() if line.startswith("curl "))
    done = subprocess.run(
        [*shlex.split(line), "--silent", "--show-error", "--fail", "--max-time", "60"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Answer: 54" in json.loads(done.stdout)["choices"][0]["message"]["content"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert "Traceback" not in log.read_text()
