"""Sums over ranks and gangs, differences, and means."""

import pytest

from sere_ray.engine.counters import BYTES
from sere_ray.observe.stats import (
    STEP_KINDS,
    StepMeans,
    StepSums,
    Totals,
    between,
    means,
    since,
    totals,
)
from sere_ray.serve.client import _line
from sere_ray.util.token_times import BOUNDS, BUCKETS, bucket_of, quantile_ms

LAYERS = [3, 7]


def rank(gang="g", union="global", **changes):
    kind = {
        "steps": 4,
        "steps_counted": 2,
        "rows": 12,
        "decode_rows": 10,
        "forward_seconds": 0.02,
        "experts_before": [20, 30],
        "experts_after": [8, 12],
        "experts_max_rank_before": [12, 16],
        "experts_max_rank_after": [6, 8],
        "critical_kept": [2, 0],
        "beyond_range": [1, 0],
        "slots_rerouted": [5, 7],
        "slots_merged": [2, 3],
        "slots_masked": [6, 1],
        "bytes_dispatched_before": [100, 300],
        "bytes_dispatched_after": [60, 140],
        **changes,
    }
    times = [0, 3] + [0] * (BUCKETS - 2)
    counters = {"layers": LAYERS, "top_k": 4, "policy": {"union": union}, "token_times": times}
    counters |= dict.fromkeys(STEP_KINDS, kind)
    return {"replica": gang, "gang": gang, "counters": counters}


def test_ranks_of_a_gang_share_what_they_agree_on_and_add_what_is_their_own():
    found = totals([rank(), rank(forward_seconds=0.04), {"gang": "g", "counters": None}])
    Totals.model_validate(found)
    decode = found["decode_only"]
    assert (decode["steps"], decode["steps_counted"], decode["experts_after"]) == (4, 2, [8, 12])
    assert (decode["rows"], decode["decode_rows"], decode["slots"]) == (24, 20, 20 * 4 * 2)
    assert decode["experts_max_rank_before"] == [12, 16]
    assert decode["slots_rerouted"] == [10, 14]
    assert decode["slots_merged"] == [4, 6]
    assert decode["slots_masked"] == [12, 2]
    assert decode["bytes_dispatched_after"] == [120, 280]
    assert decode["forward_seconds"] == pytest.approx(0.03)
    assert found["token_times"][:3] == [0, 6, 0]


def test_gangs_add_up():
    one, two = totals([rank()]), totals([rank("a"), rank("b")])
    for name, value in one["mixed"].items():
        twice = [2 * n for n in value] if isinstance(value, list) else 2 * value
        assert two["mixed"][name] == twice, name


def test_what_one_rank_does_not_know_nobody_knows():
    unknown = dict.fromkeys(("experts_max_rank_before", "experts_max_rank_after", *BYTES))
    found = totals([rank(), rank(**unknown)])["decode_only"]
    assert {name for name, value in found.items() if value is None} == set(unknown)
    assert means(found)["experts_max_rank_after"] is None
    assert "busiest rank - -> -" in _line("decode_only", found)


def test_without_an_answer_all_is_zero_and_no_mean_is_invented():
    found = totals([])
    Totals.model_validate(found)
    assert set(means(found["mixed"]).values()) == {None}


def test_means_are_per_step_and_experts_per_counted_step_and_layer():
    found = totals([rank(), rank()])["decode_only"]
    mean = means(found)
    assert set(mean) == set(StepMeans.model_fields)
    assert (mean["rows"], mean["decode_rows"], mean["step_ms"]) == (6, 5, 5)
    assert (mean["experts_before"], mean["experts_after"]) == (12.5, 5)
    assert (mean["experts_max_rank_after"], mean["critical_kept"]) == (3.5, 0.5)
    assert mean["rerouted_share"] == 24 / 160
    assert (mean["bytes_dispatched_before"], mean["bytes_dispatched_after"]) == (200, 100)
    assert "experts 12.5 -> 5  busiest rank 7 -> 3.5" in _line("decode_only", found)


def test_between_two_answers_every_field_is_of_ranks_that_answered_both_times():
    first = {"per_replica": [rank("a"), rank("gone", steps=50), {**rank("mute"), "counters": None}]}
    now = rank("a", steps=9, rows=30, experts_after=[10, 20])
    found = between(first, {"per_replica": [now, rank("new", steps=70), rank("mute", steps=80)]})
    assert not any(found["token_times"])
    change = found["mixed"]
    assert set(change) == set(StepSums.model_fields)
    assert (change["steps"], change["rows"], change["experts_after"]) == (5, 18, [2, 8])
    assert not any(change["bytes_dispatched_after"])
    Totals.model_validate(between({"per_replica": []}, {"per_replica": [now]}))


def test_since_counts_rank_by_rank_and_leaves_new_ones_out():
    then = {"a": rank("a")["counters"]}
    counted = since([rank("a", steps=9), rank("b")], then)
    assert [r["replica"] for r in counted] == ["a"]
    assert totals(counted)["decode_only"]["steps"] == 5


def test_quantiles_of_token_times():
    seconds = [0.004] * 90 + [0.02] * 9 + [3000.0]
    counts = [0] * BUCKETS
    for value in seconds:
        counts[bucket_of(value)] += 1
    assert quantile_ms(counts, 0.5) == pytest.approx(4, rel=0.1)
    assert quantile_ms(counts, 0.95) == pytest.approx(20, rel=0.1)
    assert quantile_ms(counts, 1.0) == 1e3 * BOUNDS[-1], "nothing above is told apart"
    assert quantile_ms([0] * BUCKETS, 0.9) is None
    assert quantile_ms([4] + [0] * (BUCKETS - 1), 0.5) == pytest.approx(0.05)
