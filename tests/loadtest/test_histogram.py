import math
import random

import numpy as np
import pytest

from sere_ray.loadtest.histogram import GROWTH, Histogram


def test_quantiles_are_those_of_the_times_up_to_half_a_bin():
    draw = random.Random(1)
    times = [draw.lognormvariate(-6, 1.5) for _ in range(5000)]
    histogram = Histogram().extend(times)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = float(np.quantile(times, share, method="inverted_cdf"))
        assert histogram.quantile(share) == pytest.approx(exact, rel=GROWTH - 1)


def test_parts_add_up_to_the_whole():
    times = [random.Random(2).expovariate(100) for _ in range(1000)]
    parts = [Histogram().extend(times[i::3]) for i in range(3)]
    whole = Histogram()
    for part in parts:
        whole.merge(Histogram.from_dict(part.to_dict()))
    assert whole.to_dict() == Histogram().extend(times).to_dict()
    assert whole.count == 1000


def test_nothing_and_zero():
    assert math.isnan(Histogram().quantile(0.5))
    assert Histogram().extend([0.0]).quantile(0.5) < 2e-6
