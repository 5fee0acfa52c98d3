"""What hurts the deployment that this folder shares: by its name this file is the last one."""

import time

import pytest

from tests.serve.deployment import wait_for
from tests.serve.every_path import check_drains
from tests.serve.faults import check_killed_engine, check_killed_router

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engines(live):
    """Processes of the engines before one is killed."""
    return live.processes("VLLM::EngineCore")


def test_a_killed_router(live):
    check_killed_router(live)


def test_a_killed_engine_ends_the_requests_of_its_gang(live, engines):
    """Later requests, too."""
    assert len(engines) == 2
    check_killed_engine(live)
    for _ in range(10):  # the gang needs longer to come back
        start = time.monotonic()
        status, answer, headers = live.complete(max_tokens=4)
        assert time.monotonic() - start < 5
        assert status == 503
        assert "again" in answer["error"]["message"]
        assert "retry-after" in {name.lower() for name in headers}
        time.sleep(0.3)


def test_the_gang_comes_back_and_drains_at_sigterm(live, engines):
    wait_for(lambda: live.complete(max_tokens=4)[0] == 200, 180, "the gang comes back")
    now = live.processes("VLLM::EngineCore")
    assert len(now) == 2
    orphans = [engine for engine in engines if engine.is_running() and engine not in now]
    assert not orphans, "an engine outlived its replica"
    check_drains(live)
