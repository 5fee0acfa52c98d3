"""The list of metrics: well-formed names, and the table in the docs is made from it."""

import re
from pathlib import Path

import pytest

from sere_ray.observe.metrics import METRICS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_names_follow_prometheus_conventions(metric):
    assert re.fullmatch(r"sere_[a-z0-9_]+", metric.name)
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert (metric.kind == "histogram") == bool(metric.boundaries)
    assert metric.formula
    assert "expert" not in metric.labels
    for unit in ("seconds", "bytes"):
        assert (metric.unit == unit) == (unit in metric.name.split("_"))


def test_names_are_unique():
    assert len({m.name for m in METRICS}) == len(METRICS)
