"""Where a request goes, by what ranks reported and what was placed since."""

import numpy as np
import pytest

from sere_ray.engine.signatures import DIMENSIONS, unit
from sere_ray.serve.by_experts import board as module
from sere_ray.serve.by_experts.board import Board, NotKnown
from sere_ray.serve.by_experts.kinds import Kind, Kinds
from sere_ray.serve.by_experts.placement import Gang, Likes, likeness, ranked
from sere_ray.serve.by_experts.report import KEY, Report

NOTHING = np.zeros(DIMENSIONS, dtype=np.float32)


def axis(*directions):
    vector = NOTHING.copy()
    vector[list(directions)] = 1
    return unit(vector)


COMMON = 99
SUMS, CODE = axis(COMMON, 1), axis(COMMON, 2)
"""Signatures that have something in common, as all requests have."""
KNOWN = Kinds([Kind(axis(1), SUMS, 10.0), Kind(axis(2), CODE, 10.0)])


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def stats(gang, load, likes=NOTHING, number=1, model="m", kinds=KNOWN):
    return {KEY: Report(model, gang, number, load, likes, kinds).write()}


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def board(clock):
    return Board(clock)


def place(board, text, **loads):
    return board.order(board.tell(text), loads)


def test_a_request_goes_where_its_experts_are_read_already(board):
    board.see({"a": stats("g1", 4, SUMS), "b": stats("g2", 4, CODE)})
    assert place(board, axis(1)) == ["a", "b"]
    assert place(board, axis(2)) == ["b", "a"]


def test_never_at_the_price_of_balance(board):
    board.see({"a": stats("g1", 12, SUMS), "b": stats("g2", 4, CODE)})
    assert place(board, axis(1)) == ["b", "a"]


def test_of_a_gang_the_least_loaded_rank(board):
    """All ranks of a gang read the same experts: which rank takes it is a matter of load alone."""
    board.see(
        {
            "a0": stats("g1", 5, SUMS),
            "a1": stats("g1", 3, CODE),
            "b0": stats("g2", 2, CODE),
            "b1": stats("g2", 6, CODE),
        }
    )
    assert place(board, axis(1)) == ["a1", "a0", "b0", "b1"]
    assert place(board, axis(1), a0=1.0, a1=7.0) == ["a0", "a1", "b0", "b1"]


def test_what_was_placed_counts_until_it_is_reported(board, clock):
    reported = {"a": stats("g1", 2, SUMS), "b": stats("g2", 2, CODE)}
    board.see(reported)
    for _ in range(5):
        board.placed("a")
    assert place(board, axis(1)) == ["b", "a"], "a has five more now"
    clock.now += 1
    board.see({"a": stats("g1", 2, SUMS, number=2), "b": reported["b"]})
    assert place(board, axis(1)) == ["a", "b"], "they had ended by the next report"


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({}, "1 of 2 replicas have not reported"),
        ({KEY: {"form": 0}}, "1 of 2 replicas have not reported"),
        (stats("g2", 1, model="another"), "signatures of different models"),
    ],
)
def test_what_is_missing_is_named(board, other, reason):
    with pytest.raises(NotKnown, match=reason):
        board.see({"a": stats("g1", 1), "b": other})


def test_an_old_report_is_not_believed(board, clock):
    reported = {"a": stats("g1", 1), "b": stats("g2", 1)}
    board.see(reported)
    clock.now += module.STALE_SECONDS + 1
    with pytest.raises(NotKnown, match="has not reported for 10 seconds"):
        board.see(reported)
    board.see({name: stats(f"g{name}", 1, number=2) for name in reported})


def test_a_text_of_no_known_kind(board):
    board.see({"a": stats("g1", 1), "b": stats("g2", 1)})
    with pytest.raises(NotKnown, match="no request with such a text"):
        board.tell(axis(50))
    board.see({name: stats(name, 1, number=2, kinds=Kinds()) for name in "ab"})
    with pytest.raises(NotKnown, match="no request with such a text"):
        board.tell(axis(1))


def test_a_gang_that_vanishes_is_forgotten(board):
    board.see({"a": stats("g1", 4, SUMS), "b": stats("g2", 4, CODE)})
    board.see({"b": stats("g2", 4, CODE)})
    board.placed("a")  # Ray had sent it before it noticed
    assert place(board, axis(1)) == ["b"]


def test_memory_is_bounded(board):
    board.see({"a": stats("g1", 0), "b": stats("g2", 0)})
    for _ in range(3 * module.MOST_PLACED):
        board.placed("a")
    assert len(board._ranks["a"].placed) == module.MOST_PLACED


def test_what_all_have_in_common_tells_nothing():
    usual = unit(SUMS + CODE)
    assert likeness(SUMS, SUMS, usual) == pytest.approx(1)
    assert likeness(SUMS, CODE, usual) == pytest.approx(-1)
    assert likeness(SUMS, None, usual) == likeness(NOTHING, SUMS, usual) == 0


def test_without_a_signature_the_least_loaded_gang():
    gangs = [Gang("a", 4, SUMS), Gang("b", 3, CODE), Gang("c", 9, SUMS)]
    assert [gang.name for gang in ranked(gangs, None, NOTHING)] == ["b", "a", "c"]


def test_what_a_gang_likes_follows_its_last_requests():
    likes = Likes(DIMENSIONS)
    for signature in [SUMS] * 3 + [CODE]:
        likes.add(signature)
    assert np.allclose(likes.mean, (3 * SUMS + CODE) / 4)
    for _ in range(200):
        likes.add(CODE)
    assert np.dot(unit(likes.mean), CODE) > 0.99
