"""The locustfile as users run it, against a real server."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.loadtest.servers import Control, serving, token

ROOT = Path(__file__).parents[2]


def locust(*arguments, files="loadtest/locustfile.py", expect=0):
    command = [sys.executable, "-m", "locust", "-f", files, "--headless", "--only-summary"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def figures(path):
    return json.loads(path.read_text())["rows"][0]


@pytest.mark.alone
def test_closed_loop_in_two_workers(tmp_path):
    out = tmp_path / "figures.json"
    with serving(gap=0.02) as server:
        text = locust(
            *("ClosedUser", "--host", server.url, "-u", "4", "-r", "4", "-t", "3s"),
            *("--processes", "2", "--figures", str(out)),
        )
        asked = len(server.requests)
    row = figures(out)
    assert row["failures"] == 0
    assert 0.8 * asked <= row["requests"] <= asked
    assert row["itl_ms_p50"] == pytest.approx(20, rel=0.3)
    assert row["output_tokens"] == 3 * row["requests"]
    for metric in ("TTFT", "ITL", "TPOT", "answer"):
        assert f"{metric} " in text


@pytest.mark.alone
def test_open_loop_has_its_rate(tmp_path):
    out = tmp_path / "figures.json"
    with serving(gap=0.05) as server:
        locust(
            *("OpenUser", "--host", server.url, "-u", "2", "-r", "2", "-t", "4s"),
            *("--rate", "10", "--figures", str(out)),
        )
    assert 40 <= figures(out)["requests"] <= 120  # Poisson, 2 users x 10/s x 4 s = 80


def test_a_trace_ends_the_test(tmp_path):
    out = tmp_path / "figures.json"
    with serving() as server:
        trace = ROOT / "loadtest" / "traces" / "small.jsonl"
        locust(
            *("TraceUser", "--host", server.url, "-u", "1"),
            *("--trace", str(trace), "--speed", "90", "--figures", str(out)),
        )
    assert figures(out)["requests"] == len(trace.read_text().splitlines())


def test_steps_and_slo(tmp_path):
    out = tmp_path / "figures.json"
    with serving(gap=0.01, control=Control()) as server:
        text = locust(
            *("ClosedUser", "--host", server.url, "--user-steps", "1x1,1x3"),
            *("--slo", "tpot=1", "--require-slo", "0.9", "--figures", str(out)),
            files="loadtest/locustfile.py,loadtest/steps.py",
            expect=1,
        )
    assert "kept the SLO" in text
    assert figures(out)["requests"] > 0


def test_an_endpoint_that_is_not_there():
    with serving() as server:
        url = server.url
    text = locust("ClosedUser", "--host", url, "-u", "1", "-t", "5s", expect=2)
    assert "Connection refused" in text
    assert "Traceback" not in text


def test_failures_are_failures(tmp_path):
    out = tmp_path / "figures.json"
    with serving(status=429) as server:
        locust(
            *("ClosedUser", "--host", server.url, "-u", "1", "-t", "2s", "--figures", str(out)),
            expect=1,
        )
    row = figures(out)
    assert row["failures"] == row["requests"] > 0
    assert row["ttft_ms_p50"] is None


@pytest.mark.parametrize("user", ["ClosedUser", "OpenUser"])
def test_requests_without_an_end_are_counted(user, tmp_path):
    """Long answers are those that the end of a test cuts off."""
    out = tmp_path / "figures.json"
    with serving([token("a")], stall=60) as server:
        options = ("-u", "2", "-r", "2", "-t", "3s", "--figures", str(out))
        text = locust(user, "--host", server.url, *options, expect=1)
    row = figures(out)
    assert row["requests"] == row["failures"] == 0
    assert row["unfinished"] >= 2
    assert "no answer came to an end" in text


def test_the_web_ui_starts_a_test():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ui = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "ClosedUser"]
    with serving(gap=0.02) as server:
        process = subprocess.Popen(
            [*command, "--web-host", "127.0.0.1", "--web-port", str(port)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            poll(lambda: b"<html" in urlopen(ui).read())
            form = f"user_count=2&spawn_rate=2&host={server.url}".encode()
            assert json.load(urlopen(f"{ui}/swarm", form))["success"]
            poll(lambda: len(server.requests) > 4)
            names = {row["method"] for row in json.load(urlopen(f"{ui}/stats/requests"))["stats"]}
            assert {"TTFT", "ITL", "TPOT", "answer"} <= names
        finally:
            process.terminate()
            process.wait(20)


def poll(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.2)
    pytest.fail(f"not within {seconds} s")
