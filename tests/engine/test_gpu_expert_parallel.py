"""Data and expert parallelism on two GPUs, full CUDA graphs: one union, whatever the ranks do.

What one GPU can show: ``tests/kernel/test_across_ranks_on_gpu.py``. What none can:
``test_cuda_union.py``. Tensor with expert parallelism: ``test_gpu.py``.
"""

import itertools

import numpy as np
import pytest
import torch

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.rules import EXACT, REROUTABLE, count, sere
from tests.engine.conftest import artifact_path
from tests.engine.gpu_ranks import DEMAND_POLICIES, exercise, exercise_demand, reports_of
from tests.engine.ranks import RANKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs"),
]
COUNTERS = ("experts_before", "experts_after", "slots_rerouted", "critical_kept")


@pytest.fixture(scope="module")
def reports(checkpoint):
    return reports_of(exercise, checkpoint, engines=5, time_limit=300)


@pytest.fixture(scope="module")
def similarity(checkpoint):
    return SimilarityArtifact.load(artifact_path(checkpoint("qwen3_moe"))).layers


@pytest.mark.parametrize("name", ["S=K", "off", "observe", "S=K, own GEMMs", "local observe"])
def test_answers_are_those_of_stock(reports, name):
    for report in reports:
        assert report[name]["answers"] == report["stock"]


def test_answers_before_dispatch_are_those_after_gathering(reports):
    for report in reports:
        assert report["S=1"]["answers"] != report["stock"]
        for same in ("before", "S=1, own GEMMs"):
            assert report[same]["answers"] == report["S=1"]["answers"]
        for name in ("decode_only", "mixed"):
            before, gathered = (report[n]["counters"][name] for n in ("before", "S=1"))
            # What the busiest rank reads is counted where ids are gathered only.
            assert {k: v for k, v in before.items() if "max_rank" not in k} == {
                k: v for k, v in gathered.items() if "max_rank" not in k
            }
            gathered = [report[n]["counters"]["gathered"][name] for n in ("before", "S=1")]
            assert gathered[0]["experts_read"] == gathered[1]["experts_read"]
            assert gathered[0]["busiest_read"] == gathered[1]["busiest_read"]


def test_ranks_of_a_host_exchange_inside_the_kernel(reports):
    first, second = (report["before"]["exchanges"] for report in reports)
    assert first == second > 0


def kinds_of(kinds, sizes):
    padded = [
        np.pad(np.array(k, np.int8), (0, n - len(k))) for k, n in zip(kinds, sizes, strict=True)
    ]
    return torch.from_numpy(np.concatenate(padded))


def recounted(similarity, passes):
    """Sums per kind of step, and what the launches should have written."""
    totals = {name: np.zeros((len(similarity), 4), np.int64) for name in ("decode_only", "mixed")}
    for policy, kinds, sizes, _, layers in passes:
        row_kind = kinds_of(kinds, sizes)
        if REROUTABLE not in row_kind or policy["mode"] == "off":
            for before, _, after in layers.values():
                assert before == after
            continue
        rule = {n: policy[n] for n in ("select_top_k", "threshold", "min_primary_experts")}
        for position, (layer, (before, weights, after)) in enumerate(sorted(layers.items())):
            ids, new = torch.tensor(before, dtype=torch.int32), torch.tensor(after).int()
            arguments = (ids, torch.tensor(weights), similarity[layer])
            assert (ids[row_kind == 0] == -1).all(), "padding travels as -1"
            assert torch.equal(new, sere.reroute(*arguments, row_kind=row_kind, **rule))
            rerouting = sere.find_rerouting(*arguments, row_kind=row_kind, **rule)
            counts = [int(n) for n in count(rerouting, ids, new, row_kind)]
            totals["mixed" if EXACT in row_kind else "decode_only"][position] += counts
    return totals


@pytest.mark.parametrize("name", ["S=1", "critical"])
def test_ids_and_counters_are_those_of_a_recount_over_both_ranks(reports, similarity, name):
    of_ranks = [report[name]["passes"] for report in reports]
    assert [p[3] for p in of_ranks[0]] == [p[3] for p in of_ranks[1]], "final ids differ"
    layouts = [(kinds, sizes) for _, kinds, sizes, _, _ in of_ranks[0]]
    assert any(len(k[r]) < n[r] for k, n in layouts for r in range(RANKS)), "no pass was padded"
    assert any(k[0] and not k[1] for k, _ in layouts), "no rank was idle"
    assert any({EXACT, REROUTABLE} <= {*k[0], *k[1]} for k, _ in layouts), "no pass was mixed"
    for passes in of_ranks:
        totals = recounted(similarity, passes)
        found = [report[name]["counters"] for report in reports]
        for kind, expected in totals.items():
            for column, field in enumerate(COUNTERS):
                if field == "slots_rerouted":
                    slots = zip(*(counters[kind][field] for counters in found), strict=True)
                    assert list(map(sum, slots)) == expected[:, column].tolist()
                else:
                    for counters in found:
                        assert counters[kind][field] == expected[:, column].tolist()
    if name == "critical":
        assert sum(reports[0][name]["counters"]["decode_only"]["critical_kept"]) > 0


def test_a_thousand_switches_leave_the_same_ids_on_both_ranks(reports, similarity):
    first, second = (report["switches"] for report in reports)
    assert len(first) == len(second) > 1000
    for mine, other in zip(first, second, strict=True):
        assert mine[0] == other[0], "policies differ"
        assert mine[1:4] == other[1:4], "rows or final ids differ"
    changed = sum(a[0] != b[0] for a, b in itertools.pairwise(first))
    assert changed > 300
    recounted(similarity, [p for p in first if p[4]])


def test_one_union_reroutes_at_most_what_a_union_per_rank_does(reports):
    """Both observe the same rows, those of stock."""

    def slots(name):  # a rank's own rows say what kind of step it is for a union per rank
        counters = [report[name]["counters"] for report in reports]
        kinds = (of_rank[kind] for of_rank in counters for kind in ("decode_only", "mixed"))
        return sum(sum(kind["slots_rerouted"]) for kind in kinds)

    assert 0 < slots("observe") < slots("local observe")


@pytest.fixture(scope="module", params=["margin", "spare"])
def under_demand(request, checkpoint):
    return reports_of(exercise_demand, checkpoint, request.param, engines=2, time_limit=200)


@pytest.mark.parametrize("name", ["all kept", "observe", "off"])
def test_answers_are_those_of_stock_where_nothing_is_dropped(under_demand, name):
    for report in under_demand:
        assert report[name]["answers"] == report["stock"]


def test_ranks_keep_the_same_experts_by_demand(under_demand):
    """Both count the experts of all rows, and so must agree on every layer."""
    counts = {name: [r[name]["counters"] for r in under_demand] for name in DEMAND_POLICIES}
    for first, second in counts.values():
        for field in ("experts_before", "experts_after"):
            assert first[field] == second[field]
    for name in ("observe", "fewest"):
        (first, second) = counts[name]
        for before, after in zip(first["experts_before"], first["experts_after"], strict=True):
            assert 0 < after < before
        assert sum(first["slots_rerouted"]) > 0 < sum(second["slots_rerouted"])
    all_kept, off = counts["all kept"][0], counts["off"][0]
    assert all_kept["experts_after"] == all_kept["experts_before"]
    assert not any(all_kept["slots_rerouted"])
    assert not any(off["experts_before"])
    assert any(report["fewest"]["answers"] != report["stock"] for report in under_demand)
