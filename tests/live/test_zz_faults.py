"""What hurts the deployment that this folder shares: by its name this file is the last one."""

import signal
import threading
import time

import pytest

from tests.serve.faults import check_killed_router

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]


def test_a_killed_router(live):
    check_killed_router(live)


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
