"""The simulation of request routers: gangs and requests that can be counted by hand."""

import random

import numpy as np
import pytest

from sere_ray.bench.locality.ceiling import ceiling
from sere_ray.bench.locality.knowledge import FromItself, FromName, FromText, Mixed, signature_of
from sere_ray.bench.locality.recorded import Request
from sere_ray.bench.locality.rules import RULES
from sere_ray.bench.locality.run import Nothing
from sere_ray.bench.locality.simulate import arrivals, simulate
from sere_ray.bench.locality.texts import KINDS, conversations

EXPERTS = 16


def requests(count=120, steps=8):
    """Two kinds; those of one kind always choose the same two experts of each layer."""
    words = {"sums": "Work out 3 * {} + 4.", "code": "def area_{}(self): return self.width"}
    made = []
    for number in range(count):
        kind = ("sums", "code")[number % 2]
        ids = np.zeros((6 + steps, 3, 2), dtype=np.uint8)
        ids[:] = (2, 3) if kind == "sums" else (8, 9)
        made.append(Request(kind, number // 4, number % 4 // 2, words[kind].format(number), 6, ids))
    return made


def run(rule, knowledge, gangs=2, rows=8):
    coming = arrivals(requests(), gangs * rows, "mixed", 0)
    assert sum(map(len, coming)) == 120
    return simulate(coming, gangs, EXPERTS, RULES[rule](random.Random(0)), knowledge)


def test_what_is_placed_by_load_reads_all_and_what_is_placed_by_experts_half():
    mixed = run("power_of_two", Nothing(EXPERTS))
    assert mixed["experts_read"] > 3.5
    assert mixed["known"] == 0
    for knowledge in (FromItself(EXPERTS), FromText()):
        apart = run("balance_first", knowledge)
        assert apart["experts_read"] < 3
        assert apart["load_spread"] < 0.7
    assert run("likeness_first", FromText())["experts_read"] < 2.6


def test_the_ceiling_is_what_groups_read():
    found = ceiling(requests(), gangs=2, rows=8, num_experts=EXPERTS)
    assert found["experts_read"] == 2
    assert found["fewer"] == pytest.approx(0.5, abs=0.02)


def test_a_conversation_is_known_from_its_second_turn():
    first, second = requests(4)[0], requests(4)[2]
    way = Mixed(FromName("conversation"), FromName("key"))
    assert way.tell(first, "k") is None
    way.learn(first, "k", signature_of(first, EXPERTS))
    assert np.array_equal(way.tell(second, "other"), signature_of(first, EXPERTS))
    assert way.tell(requests(9)[8], "k") is not None
    assert way.tell(requests(9)[8], "other") is None


def test_there_are_texts_of_every_kind():
    found = conversations(0)
    for kind in KINDS:
        turns = [turn for c in found if c.kind == kind for turn in c.turns]
        assert len(turns) > 150
    assert conversations(0) == found != conversations(1)
