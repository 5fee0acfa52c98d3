"""The arithmetic of the overhead's result; the measurement itself is a command."""

import json
from pathlib import Path

import pytest

from sere_ray.bench.metrics_overhead import DEFAULT_INTERVAL, Arm, summary

RESULT = Path(__file__).parents[2] / "docs" / "results" / "metrics-overhead.json"


def test_cost_of_a_reading_is_the_time_lost_over_the_readings():
    never = Arm(None, step_ms=[10.0, 10.0, 20.0])
    default = Arm(DEFAULT_INTERVAL, step_ms=[10.0, 11.0, 20.0], reads=3, read_ms=[2.0, 3.0, 4.0])
    # 2 % of the time is lost to 20 readings a second: 1 ms each.
    often = Arm(0.05, step_ms=[10 / 0.98, 10 / 0.98, 20 / 0.98], reads=300, read_ms=[2.0])
    result = summary([never, default, often], seconds=5.0)
    assert result["cost_of_a_reading_ms"]["median"] == pytest.approx(1.0)
    assert result["share_of_a_step_at_the_default"]["max"] == pytest.approx(
        0.001 / DEFAULT_INTERVAL
    )
    rows = result["rows"]
    assert [row["ratio_to_never"]["median"] for row in rows[:2]] == [1.0, 1.0]
    assert rows[1]["ratio_to_never"]["max"] == 1.1
    assert rows[1]["asked_to_answered_ms"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert rows[0]["asked_to_answered_ms"] is None


def test_what_was_measured_keeps_the_promise():
    """Less than 0.5 % of a step at the default interval."""
    measured = json.loads(RESULT.read_text())
    assert measured["default_interval_s"] == DEFAULT_INTERVAL
    assert measured["share_of_a_step_at_the_default"]["max"] < 0.005
    assert min(row["repeats"] for row in measured["rows"]) >= 5
