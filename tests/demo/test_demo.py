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
NAMES = ["stock", "margin 0.01", "margin 0.025", "S=2"]


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


def test_quality_of_the_result_file(kept):
    document = json.loads((kept[2] / "demo.json").read_text())
    assert {"command", "machine", "versions", "commit", "date", "summary"} <= set(document)
    quality = document["quality"]
    assert [row["policy"] for row in quality] == NAMES
    stock, mild, strong, published = quality
    assert stock["top1_agreement"] == 1
    assert stock["kl_mean"] == 0
    assert 0 < mild["kl_mean"] < strong["kl_mean"]
    assert mild["kl_mean"] < published["kl_mean"] / 1.5
    assert mild["experts_read"] < published["experts_read"] * 1.05


def test_speed_of_the_result_file(kept):
    """At the reads of the trained model; times themselves are not for a busy machine to check."""
    document = json.loads((kept[2] / "demo.json").read_text())
    stock, mild, strong, published = document["speed"]
    assert [row["policy"] for row in document["speed"]] == NAMES
    assert (stock["speedup"], stock["tau"], published["tau"]) == (1, None, None)
    assert stock["experts_read"] > mild["experts_read"] > strong["experts_read"]
    wanted = [row["experts_read"] for row in document["quality"]]
    for row, reads in zip(document["speed"], wanted, strict=True):
        assert row["rounds"] >= 2
        assert reads - 0.1 < row["experts_read"] * 1.05 < reads * 1.25


def test_served_runs_of_the_result_file(kept):
    runs = json.loads((kept[2] / "demo.json").read_text())["runs"]
    assert [run["policy"] for run in runs] == NAMES
    assert runs[0]["accuracy"] > 0.85
    assert all(run["experts_read"] < runs[0]["experts_read"] for run in runs[1:])


def test_page_is_self_contained(kept):
    page = (kept[2] / "demo.html").read_text()
    assert page.count("<img ") == 2
    assert not re.search(r"(src|href)=.?https?:", page)


def test_tables_fit_a_terminal_words_come_first_and_no_log_lines(kept):
    lines = kept[1].read_text().splitlines()
    rows = [line for line in lines if re.match(r" {1,2}(policy|stock|margin|S=)", line)]
    assert len(rows) == 10
    assert all(len(line) <= 80 and "…" not in line for line in rows)
    first = next(n for n, line in enumerate(lines) if line.startswith(" policy"))
    assert "times as fast" in " ".join(lines[:first])
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
