"""Tensor parallelism with experts over all GPUs: alone under `margin`, and with data parallelism.

What no GPU is needed for: ``test_cuda_shards.py``. The second part has run on no GPU yet, so
engines start with it under the key `tensor_and_data_parallel` alone.
"""

import pytest
import torch

from sere_ray.engine.control import calls_of, set_policy
from sere_ray.policy.policy import Policy
from tests.engine.conftest import generate, prompts, running_engine, sere_key
from tests.engine.gpu_ranks import (
    DEMAND,
    DEMAND_POLICIES,
    NO_MULTICAST,
    SHARDED_POLICIES,
    exercise_sharded,
    reports_of,
)
from tests.engine.test_gpu import GRAPHS

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
GPUS = torch.cuda.device_count()
EXACT = ("S=K", "all kept", "observe", "off")
"""Policies under which answers are those of stock."""


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_tensor_and_expert_parallel_under_margin(checkpoint, monkeypatch):
    """Both workers see every row: were a logit of one a bit off, counters would not be the same."""
    for name, value in NO_MULTICAST.items():
        monkeypatch.setenv(name, value)
    options = {**GRAPHS, "tensor_parallel_size": 2, "enable_expert_parallel": True}
    folder = checkpoint("qwen3_moe")
    with running_engine(folder, **options) as engine:
        stock, _ = generate(engine, prompts())
    key = {**sere_key(folder), **DEMAND, "rule": "margin"}
    with running_engine(folder, key, **options) as engine:
        for name, changes in DEMAND_POLICIES.items():
            set_policy(engine, Policy.parse({**key, **changes}))
            calls_of(engine).counters(reset=True)
            answers, _ = generate(engine, prompts())
            first, second = calls_of(engine).counters(reset=True)
            assert first == second
            counts = first["decode_only"]
            if name in EXACT:
                assert answers == stock, name
            if name in ("observe", "fewest"):
                pairs = zip(counts["experts_before"], counts["experts_after"], strict=True)
                assert all(0 < after < before for before, after in pairs)
                assert sum(counts["slots_rerouted"]) > 0
        assert answers != stock, "the last one keeps the fewest experts"


@pytest.fixture(scope="module")
def reports(checkpoint):
    if GPUS < 4:
        pytest.skip("needs four GPUs")
    return reports_of(exercise_sharded, checkpoint, engines=3, time_limit=400)


CASES = [
    *(("sere", name) for name in SHARDED_POLICIES),
    *(("margin", name) for name in DEMAND_POLICIES),
]


@pytest.mark.parametrize("case", [case for case in CASES if case[1] in EXACT])
def test_answers_are_those_of_stock_where_nothing_changes(reports, case):
    for report in reports:
        assert report[case][0] == report["stock"]


@pytest.mark.parametrize("case", [("sere", "S=1"), ("margin", "fewest")])
def test_all_ranks_read_the_same_experts(reports, case):
    """Both engines count the experts of all rows, and so must agree on every layer."""
    first, second = (report[case][1]["decode_only"] for report in reports)
    for field in ("experts_before", "experts_after", "critical_kept"):
        assert first[field] == second[field]
    for before, after in zip(first["experts_before"], first["experts_after"], strict=True):
        assert 0 < after < before
    assert sum(first["slots_rerouted"]) > 0 < sum(second["slots_rerouted"])
    assert any(report[case][0] != report["stock"] for report in reports)
