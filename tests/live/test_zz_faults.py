"""What hurts the deployment that this folder shares: by its name this file is the last one."""

import signal
import threading
import time

import pytest

from tests.live.traffic import at_once
from tests.serve.deployment import ADMIN, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]


def test_a_killed_router_comes_back_with_its_state(live):
    status = live.sere("policy", {"mode": "on", "select_top_k": 1, "threshold": 0.25})
    artifact = live.sere("artifact")
    (router,) = live.processes("ray::RouterActor")
    router.send_signal(signal.SIGKILL)
    found, answer, headers = live.request("GET", "/sere/policy", None, ADMIN)
    assert found in (200, 503)
    if found == 503:
        assert "retry-after" in {name.lower() for name in headers}
        assert "restarting" in answer["error"]["message"]
    assert at_once(live, 4)[0][0] == 200  # replicas go on with what they have

    def is_back():
        found, answer, _ = live.request("GET", "/sere/policy", None, ADMIN)
        return found == 200 and answer["replicas_settled"] == 2

    seconds = wait_for(is_back, 90, "the router with both replicas")
    print(f"router back after {seconds:.1f} s")
    assert live.sere("policy") == status
    assert live.sere("artifact") == artifact
    assert live.sere("audit")["entries"][-1]["what"] == "restart"
    assert live.sere("policy", {"threshold": None})["replicas_settled"] == 2


def test_a_killed_engine_ends_the_requests_of_its_gang(live):
    """Clear errors in bounded time, for requests under way and for later ones. (That a gang comes
    back is tests/serve/test_two_gangs.py.)"""
    results = []

    def long_request():
        start = time.monotonic()
        results.append((live.complete(max_tokens=200)[0], time.monotonic() - start))

    threads = [threading.Thread(target=long_request) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    live.processes("VLLM::EngineCore_DP1")[0].send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a client hangs"
    print("requests under way:", sorted(results))
    assert {status for status, _ in results} == {503}
    assert max(seconds for _, seconds in results) < 10
    for _ in range(10):  # the gang needs longer to come back
        start = time.monotonic()
        status, answer, headers = live.complete(max_tokens=4)
        assert time.monotonic() - start < 5
        assert status == 503
        assert "again" in answer["error"]["message"]
        assert "retry-after" in {name.lower() for name in headers}
        time.sleep(0.3)
