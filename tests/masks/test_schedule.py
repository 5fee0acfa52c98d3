"""Every unit of a level is trained on exactly once, however fast workers are."""

import random

import pytest

from sere_ray.masks.schedule import Units


@pytest.mark.parametrize("seed", range(5))
def test_each_unit_once(seed):
    speeds = random.Random(seed)
    units, done = Units(steps=17, workers=4), []
    while units.done < units.total:
        mine = [units.of_worker(rank) for rank in range(4)]
        counts = [min(speeds.randint(0, 2 + 3 * rank), len(mine[rank])) for rank in range(4)]
        for own, count in zip(mine, counts, strict=True):
            done += own[:count]
        units.take(counts)
        assert units.done == len(done)
        # a state that was saved goes on with the same
        units = Units(17, 4, units.whole, units.ahead)
        assert set(range(units.whole * 4)) | set(units.ahead) == set(done)
    assert sorted(done) == list(range(17 * 4))
    assert (units.whole, units.ahead) == (17, [])


def test_workers_in_step_have_the_parts_of_a_step():
    units = Units(steps=3, workers=2)
    assert [units.of_worker(rank)[0] for rank in range(2)] == [0, 1]
    units.take([1, 1])
    assert [units.of_worker(rank)[0] for rank in range(2)] == [2, 3]
    assert (units.whole, units.ahead) == (1, [])
