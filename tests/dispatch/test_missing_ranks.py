"""A rank that dies or hangs in the middle of a layer: the others name it, in bounded time."""

import os
import signal
import time

import pytest
import torch

from sere_ray.dispatch import AllToAll, MissingRankError
from sere_ray.util.ports import free_port
from tests.dispatch.rank_pool import TIMEOUT, RankPool
from tests.dispatch.test_all_to_all import EXPERTS, HIDDEN, TOP_K

LOST = 1
SECONDS = TIMEOUT.total_seconds()

pytestmark = pytest.mark.timeout(120)


def lose_a_rank(ranks, how, where):
    """``(message, seconds)`` of the failure; rank ``LOST`` is gone after its dispatch or before."""
    owner = torch.arange(EXPERTS) % ranks.size
    exchange = AllToAll(owner, ranks.group, ranks.greeting)
    generator = torch.Generator().manual_seed(ranks.rank)
    hidden = torch.randn(5, HIDDEN)
    weights = torch.rand(5, TOP_K)
    start = time.monotonic()
    try:
        for step in range(4):
            ids = torch.randint(0, EXPERTS, (5, TOP_K), generator=generator)
            gone = step == 2 and ranks.rank == LOST
            if gone and where == "dispatch":
                os.kill(os.getpid(), how)
            arrived, sent = exchange.dispatch(hidden, ids, weights)
            if gone and where == "combine":
                os.kill(os.getpid(), how)
            start = time.monotonic()
            exchange.combine(arrived.hidden_states, sent)
    except MissingRankError as error:
        return str(error), time.monotonic() - start
    return "nothing was raised", 0.0


@pytest.mark.parametrize(
    ("how", "where", "within"),
    [
        pytest.param(signal.SIGKILL, "dispatch", 2.0, marks=pytest.mark.alone),
        pytest.param(signal.SIGKILL, "combine", 2.0, marks=pytest.mark.alone),
        (signal.SIGSTOP, "dispatch", 2 * SECONDS + 4),
    ],
)
def test_the_others_name_it(how, where, within, has_words, record_property):
    pool = RankPool(3, free_port())
    try:
        answers = pool.run(lose_a_rank, how, where, but=(LOST,))
        for message, seconds in answers:
            has_words(message, "of expert-parallel rank", f"missing: {LOST}.", "Restart all ranks")
            assert seconds < within
        record_property("seconds", [seconds for _, seconds in answers])
        print(how.name, where, [round(seconds, 2) for _, seconds in answers])
    finally:
        pool.close()
    assert not any(process.is_alive() for process in pool.processes)


def call_wrongly(ranks):
    """An error of the caller, on all ranks alike, is not a missing rank."""
    exchange = AllToAll(torch.zeros(EXPERTS), ranks.group, ranks.greeting)
    try:
        exchange.dispatch(torch.zeros(2, HIDDEN), torch.zeros(3, TOP_K), torch.zeros(3, TOP_K))
    except MissingRankError as error:
        return str(error)
    except (RuntimeError, IndexError):
        return None


def test_a_wrong_call_is_not_a_missing_rank():
    pool = RankPool(2, free_port())
    try:
        assert pool.run(call_wrongly) == [None, None]
    finally:
        pool.close()
