"""What hurts the deployment that this folder shares: by its name this file is the last one."""

import time

import pytest

from tests.serve.faults import check_killed_engine, check_killed_router

pytestmark = pytest.mark.engine


def test_a_killed_router(live):
    check_killed_router(live)


def test_a_killed_engine_ends_the_requests_of_its_gang(live):
    """Later requests, too. (That a gang comes back is tests/serve/test_two_gangs.py.)"""
    check_killed_engine(live)
    for _ in range(10):  # the gang needs longer to come back
        start = time.monotonic()
        status, answer, headers = live.complete(max_tokens=4)
        assert time.monotonic() - start < 5
        assert status == 503
        assert "again" in answer["error"]["message"]
        assert "retry-after" in {name.lower() for name in headers}
        time.sleep(0.3)
