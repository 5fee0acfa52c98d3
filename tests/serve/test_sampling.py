"""Sampled requests come in runs, and their share is the one that was asked for."""

import random
from itertools import groupby

import pytest

from sere_ray.serve.replica.sampling import RUN, Sampler


@pytest.mark.parametrize("share", [0.005, 0.05, 0.5, 0.9])
def test_the_share_in_the_long_run(share):
    sampler, requests = Sampler(share, random.Random(1).random), 400_000
    found = sum(sampler.takes() for _ in range(requests)) / requests
    assert found == pytest.approx(share, rel=0.06)


def test_sampled_requests_follow_each_other():
    sampler = Sampler(0.01, random.Random(2).random)
    taken = [sampler.takes() for _ in range(50_000)]
    runs = [len(list(group)) for is_taken, group in groupby(taken) if is_taken]
    assert len(runs) > 20
    assert all(length % RUN == 0 for length in runs[:-1])


def test_none_and_all():
    assert not any(Sampler(0.0, random.random).takes() for _ in range(1000))
    assert all(Sampler(1.0, random.random).takes() for _ in range(1000))
