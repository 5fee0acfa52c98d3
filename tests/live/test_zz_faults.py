"""What hurts the deployment that this folder shares: by its name this file is the last one."""

import pytest

from tests.serve.every_path import check_drains
from tests.serve.faults import (
    check_killed_engine,
    check_killed_router,
    check_requests_wait_for_the_gang,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engines(live):
    """Processes of the engines before one is killed."""
    return live.processes("VLLM::EngineCore")


def test_a_killed_router(live):
    check_killed_router(live)


def test_a_killed_engine_ends_the_requests_of_its_gang_and_later_ones_wait(live, engines):
    assert len(engines) == 2
    check_killed_engine(live)
    check_requests_wait_for_the_gang(live)


def test_the_gang_is_whole_and_drains_at_sigterm(live, engines):
    now = live.processes("VLLM::EngineCore")
    assert len(now) == 2
    orphans = [engine for engine in engines if engine.is_running() and engine not in now]
    assert not orphans, "an engine outlived its replica"
    check_drains(live)
