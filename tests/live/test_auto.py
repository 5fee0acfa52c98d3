"""Mode ``auto`` on real engines: up under load with a target out of reach, exact when idle."""

import threading
import time
from contextlib import contextmanager

import pytest

from sere_ray.util.token_times import SLICE_SECONDS
from tests.serve.deployment import ADMIN, wait_for

pytestmark = pytest.mark.engine
STREAMS = 6
TOKENS = 48


@contextmanager
def load(served):
    """Requests without pause, each in its thread."""
    stop, statuses = threading.Event(), []

    def send():
        while not stop.is_set():
            statuses.append(served.complete(max_tokens=TOKENS)[0])

    threads = [threading.Thread(target=send) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_up_under_load_and_exact_when_idle(live):
    before = live.sere("policy")
    try:
        status = live.sere("policy", {"mode": "auto"})
        assert (status["mode"], status["auto"]["level"]) == ("auto", 0)
        assert status["policy"]["mode"] == "off"
        with load(live) as statuses:
            seconds = wait_for(lambda: level(live) == 2, 30, "the strongest level")
            print(f"level 2 after {seconds:.1f} s under load")
            status = live.sere("policy")
            assert (status["policy"]["mode"], status["policy"]["select_top_k"]) == ("on", 1)
            assert status["auto"]["tpot_ms"] > 0.01
            assert status["auto"]["load"] > 0
        assert set(statuses) == {200}
        seconds = wait_for(lambda: level(live) == 0, 10, "exact routing")
        print(f"exact {seconds:.1f} s after the load")
        status = live.sere("policy")
        assert status["policy"]["mode"] == "off"
        mine = [e for e in live.sere("audit")["entries"] if e["who"] == "auto"]
        # A busy machine may decode nothing for half a second, which is idle: then it starts anew.
        levels = [entry["level"] for entry in mine]
        assert levels[-3:] == [1, 2, 0], levels
        assert all(entry["reason"] == "idle" for entry in mine if entry["level"] == 0)
        assert mine[-1]["reason"] == "idle"
    finally:
        status = live.sere("policy", {"mode": "on"})
    assert (status["mode"], status["policy"]) == ("on", before["policy"])


def level(live):
    return live.sere("policy")["auto"]["level"]


def test_stats_of_what_the_load_did(live):
    """Counters that only a running deployment has: token times, and what ranks sent."""
    time.sleep(SLICE_SECONDS + 0.1)  # what came before has been counted then
    before = live.sere("stats")["total"]
    with load(live) as statuses:
        wait_for(lambda: sum_of(live, "rows") > sum(of(before, "rows")) + 300, 30, "rows")
    timed = sum(before["token_times"]) + len(statuses) * (TOKENS - 1)  # a first token has no time
    wait_for(lambda: sum(live.sere("stats")["total"]["token_times"]) == timed, 10, "each is timed")
    stats = live.sere("stats")
    assert stats["tpot_p90_ms"] > 0
    mean = stats["decode_only_means"]
    assert 0 < mean["experts_max_rank_after"] < mean["experts_after"] <= mean["experts_before"]
    assert mean["rows"] >= 1
    assert mean["bytes_dispatched_after"] == mean["bytes_dispatched_before"] > 0
    assert 0 <= mean["rerouted_share"] <= 1
    line = live.cli("stats").stdout
    assert "ms/token (p90)" in line
    assert "busiest rank" in line


def of(total, name):
    return [total[kind][name] for kind in ("decode_only", "mixed")]


def sum_of(live, name):
    return sum(of(live.sere("stats")["total"], name))


def test_a_mode_that_is_none_is_refused(live):
    status, answer, _ = live.request("PUT", "/sere/policy", {"mode": "fast"}, ADMIN)
    assert status == 422
    assert "'fast'" in answer["error"]["message"]
