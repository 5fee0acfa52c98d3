"""The arithmetic of the result of production scores; the measurement itself is a command."""

from sere_ray.bench.production_score import DEFAULT_SHARE, SHARES, Arm, quality_row, summary
from sere_ray.observe.score import ScoreSums


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
