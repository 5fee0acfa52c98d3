"""Kinds of requests, and what they tell of one that comes."""

import numpy as np
import pytest

from sere_ray.engine.signatures import DIMENSIONS, unit
from sere_ray.serve.by_experts import kinds as module
from sere_ray.serve.by_experts.kinds import Kind, Kinds
from sere_ray.serve.by_experts.report import FORM, KEY, Report


def near(direction, rng, size=DIMENSIONS, spread=0.1):
    vector = np.zeros(size, dtype=np.float32)
    vector[direction] = 1
    return unit(vector + rng.normal(0, spread / 16, size).astype(np.float32))


@pytest.fixture
def seen():
    """Three kinds of text, in turns; texts of kind i want experts of kind 10 + i."""
    rng, kinds = np.random.default_rng(0), Kinds()
    for i in range(60):
        kinds.add(near(i % 3, rng), near(10 + i % 3, rng))
    return kinds


def test_a_text_tells_the_experts_of_its_kind(seen):
    rng = np.random.default_rng(1)
    assert len(seen.kinds) == 3
    for kind in range(3):
        told = seen.tell(near(kind, rng))
        assert told[10 + kind] > 0.95
    assert seen.tell(near(77, rng)) is None
    assert seen.tell(np.zeros(DIMENSIONS, dtype=np.float32)) is None
    assert Kinds().tell(near(0, rng)) is None


def test_what_is_usual_is_the_mean_over_requests(seen):
    assert seen.usual[10:13] == pytest.approx([1 / 3] * 3, abs=0.02)


def test_they_stay_few_and_new_ones_replace_rare_ones(monkeypatch):
    monkeypatch.setattr(module, "MOST_KINDS", 4)
    rng, kinds = np.random.default_rng(0), Kinds()
    for i in range(200):
        kinds.add(near(i % 4, rng), near(i % 4, rng))
    for _ in range(20):
        kinds.add(near(100, rng), near(101, rng))
        assert len(kinds.kinds) == 4
    assert kinds.tell(near(100, rng))[101] > 0.95


def test_a_kind_follows_its_requests():
    """After many requests of other experts (another policy of prompts, say) it tells those."""
    rng, kinds = np.random.default_rng(0), Kinds()
    for expert in (5, 6):
        for _ in range(1000):
            kinds.add(near(0, rng), near(expert, rng))
    assert kinds.tell(near(0, rng))[6] > 0.95


def test_a_report_is_read_as_it_was_written(seen):
    rng = np.random.default_rng(2)
    sent = Report("gates", "g1", 7, 3, near(12, rng), seen)
    stats = {"other": 1, KEY: sent.write()}
    found = Report.read(stats)
    assert (found.model, found.gang, found.number, found.load) == ("gates", "g1", 7, 3)
    assert np.dot(found.likes, sent.likes) > 0.999
    for kind in range(3):
        text = near(kind, rng)
        assert np.dot(found.kinds.tell(text), seen.tell(text)) > 0.999
    assert sum(len(part) for kind in stats[KEY]["kinds"] for part in kind[:2]) == 3 * 512


@pytest.mark.parametrize(
    "change",
    [
        {"form": FORM + 1},
        {"likes": b"short"},
        {"likes": None},
        {"load": "many"},
        {"kinds": [(b"", b"", 1.0)]},
        {"kinds": [1]},
        {"kinds": [(bytes(256), bytes(256), 1.0)] * (module.MOST_KINDS + 1)},
    ],
)
def test_what_is_no_report_is_none(seen, change):
    good = Report("gates", "g1", 7, 3, np.zeros(DIMENSIONS, dtype=np.float32), seen).write()
    assert Report.read({KEY: good}) is not None
    assert Report.read({KEY: {**good, **change}}) is None
    assert Report.read({}) is None
    assert Report.read({KEY: None}) is None


def test_kinds_of_several_ranks_tell_together():
    rng = np.random.default_rng(0)
    parts = [Kinds([Kind(near(i, rng), near(10 + i, rng), 5.0)]) for i in range(2)]
    both = Kinds.of_several(parts)
    assert [both.tell(near(i, rng))[10 + i] > 0.95 for i in range(2)] == [True, True]
