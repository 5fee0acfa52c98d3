"""The arithmetic of the result of production scores; the measurement itself is a command."""

import json
from pathlib import Path

import pytest

from sere_ray.bench.production_score import DEFAULT_SHARE, SHARES, Arm, quality_row, summary
from sere_ray.observe.score import ScoreSums

RESULT = Path(__file__).parents[2] / "docs" / "results" / "production-score-demo.json"


def test_the_loss_at_the_default_share_is_a_tenth_of_that_at_ten_times_it():
    none = Arm(0.0, [1000.0, 1000.0, 500.0], answers=30)
    default = Arm(DEFAULT_SHARE, [1000.0, 990.0, 500.0], answers=30, scored=0)
    tenfold = Arm(10 * DEFAULT_SHARE, [980.0, 990.0, 490.0], answers=30, scored=2)
    most = Arm(1.0, [900.0, 900.0, 450.0], answers=30, scored=30)
    result = summary([], [none, default, tenfold, most], answers=10)
    assert result["lost_at_the_default"] == {"median": 0.002, "min": 0.001, "max": 0.002}
    rows = result["throughput"]
    assert [row["ratio_to_none"]["median"] for row in rows] == [1.0, 1.0, 0.98, 0.9]
    assert rows[1]["ratio_to_none"]["min"] == 0.99


def test_a_result_without_repeats_says_only_what_was_scored():
    result = summary([{"policy": "exact"}], [Arm(share) for share in SHARES], answers=10)
    assert (result["throughput"], result["lost_at_the_default"]) == ([], None)


def test_a_row_has_both_judges_or_one():
    sums = ScoreSums()
    sums.add_sums(10.0, 12.0, agreed=8, count=10)
    assert quality_row("p", sums, None) == {
        "policy": "p",
        "answers": 1,
        "tokens": 10,
        "nats": 0.2,
        "standard_error": None,
        "agreement": 0.8,
    }
    assert quality_row("p", sums, sums)["evaluator_nats"] == 0.2


def test_what_was_measured_keeps_the_promise():
    """Scores are the evaluator's, exact requests score 0, and the default share is cheap."""
    measured = json.loads(RESULT.read_text())
    exact, *others = measured["quality"]
    assert abs(exact["nats"]) < 1e-4
    assert exact["agreement"] == 1
    for row in others:
        assert row["nats"] == pytest.approx(row["evaluator_nats"], abs=row["standard_error"])
        assert row["agreement"] == pytest.approx(row["evaluator_agreement"], abs=0.01)
    assert measured["default_share"] == DEFAULT_SHARE
    assert measured["lost_at_the_default"]["median"] < 0.005
    assert min(row["repeats"] for row in measured["throughput"]) >= 5
