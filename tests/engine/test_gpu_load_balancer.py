"""vLLM's load balancer (EPLB) with redundant experts that move, on two GPUs, under re-routing."""

import pytest
import torch

from tests.engine.gpu_ranks import exercise_balanced, reports_of
from tests.engine.ranks import RANKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def reports(checkpoint):
    return reports_of(exercise_balanced, checkpoint, engines=3, time_limit=200)


@pytest.mark.parametrize("union", ["global", "local"])
def test_answers_at_top_k_are_those_of_stock(reports, union):
    for report in reports:
        assert report[union, 4][0] == report["stock"]


@pytest.mark.parametrize("union", ["global", "local"])
def test_fewer_logical_experts_are_read(reports, union):
    for report in reports:
        answers, counters = report[union, 1]
        assert answers != report["stock"]
        counts = counters["decode_only"]
        assert 0 < sum(counts["experts_after"]) < sum(counts["experts_before"])


def test_one_union_is_the_same_on_both_ranks(reports):
    first, second = (report["global", 1][1]["decode_only"] for report in reports)
    for name in ("experts_before", "experts_after"):
        assert first[name] == second[name]
