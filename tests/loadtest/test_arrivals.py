import itertools

import numpy as np
import pytest

from sere_ray.loadtest.arrivals import Arrivals, parse_steps
from sere_ray.util.errors import SereError


def first(arrivals, count, seed=3):
    return list(itertools.islice(arrivals.times(seed), count))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_rate_and_burstiness(burstiness):
    gaps = np.diff(first(Arrivals.at(20.0, burstiness), 20_000))
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert (gaps.std() / gaps.mean()) ** 2 == pytest.approx(1 / burstiness, rel=0.1)


def test_steps_have_their_rates():
    arrivals = Arrivals.checked(parse_steps("100x1,100x10,50x2"), 1.0)
    times = np.array(first(arrivals, 2000))
    counts = [((times >= a) & (times < b)).sum() for a, b in ((0, 100), (100, 200), (200, 250))]
    assert counts == pytest.approx([100, 1000, 100], rel=0.25)
    assert arrivals.seconds == 250


def test_a_seed_says_all():
    assert first(Arrivals.at(2.0), 50) == first(Arrivals.at(2.0), 50)
    assert first(Arrivals.at(2.0), 50) != first(Arrivals.at(2.0), 50, seed=4)


@pytest.mark.parametrize("text", ["20", "20x", "ax2", "20x1;20x2", ""])
def test_what_are_no_steps(text, has_words):
    with pytest.raises(SereError) as error:
        parse_steps(text)
    has_words(str(error.value), "--steps", "20x1,20x4")


def test_rates_must_be_positive(has_words):
    with pytest.raises(SereError) as error:
        Arrivals.at(0.0)
    has_words(str(error.value), "greater than 0")
    with pytest.raises(SereError) as error:
        Arrivals.at(1.0, -1)
    has_words(str(error.value), "burstiness", "-1")
