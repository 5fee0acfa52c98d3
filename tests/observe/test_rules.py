"""Rules and dashboard: rendered files are current, names exist, every alert has a unit test."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sere_ray.observe.alerts import ALERTS
from sere_ray.observe.dashboards import DASHBOARD, expressions
from sere_ray.observe.metrics import METRICS, VLLM
from sere_ray.observe.render import metrics_table, rendered
from sere_ray.observe.rules import (
    SERE_RECORDINGS,
    recorded_names,
    serving_recordings,
)

ROOT = Path(__file__).parents[2]
UNIT_TESTS = Path(__file__).parent / "alerts.test.yml"
promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing: apt install prometheus"
)
EXPRESSIONS = [
    *expressions(DASHBOARD),
    *((alert.name, alert.expr) for alert in ALERTS),
    *((rule.record, rule.expr) for rule in (*SERE_RECORDINGS, *serving_recordings(2.0))),
    *((a.name, a.expr) for a in DASHBOARD.annotations if a.expr is not None),
]


def names_in(expr):
    """Metrics that an expression reads: of sere-ray, vLLM and the recording rules."""
    return set(re.findall(r"\b(?:ray_(?:sere|vllm)_\w+|(?:sere:[\w:]+)|llm_\w+)", expr))


def known_names():
    names = recorded_names()
    kinds = {m.exported: m.kind for m in METRICS} | VLLM
    for name, kind in kinds.items():
        ends = ("_bucket", "_count") if kind == "histogram" else ("",)
        names |= {name + end for end in ends}
    return names


@pytest.mark.parametrize("path", sorted(rendered()))
def test_committed_files_are_what_the_definitions_render(path):
    assert (ROOT / "deploy" / path).read_text() == rendered()[path], "run: dashboards render deploy"


def test_the_price_is_a_parameter():
    content = rendered(rank_hour_price=3.5)["prometheus/recording.yml"]
    assert "vector(3.5)" in content


def test_the_table_of_the_docs_is_made_from_the_list():
    assert metrics_table() in (ROOT / "docs" / "operate.md").read_text(), (
        "paste what sere_ray.observe.render.metrics_table() returns"
    )


@pytest.mark.parametrize(("where", "expr"), EXPRESSIONS, ids=[where for where, _ in EXPRESSIONS])
def test_every_metric_that_is_read_exists(where, expr):
    assert names_in(expr) - known_names() == set(), where


def test_every_metric_of_sere_ray_is_shown_or_recorded():
    read = set().union(*(names_in(expr) for _, expr in EXPRESSIONS))
    shown = {m.exported for m in METRICS} & {re.sub("_(bucket|count)$", "", n) for n in read}
    # What the gate would have sent and made of ranks is there for questions of the moment.
    assert {m.exported for m in METRICS} - shown == {
        "ray_sere_experts_max_rank_before_total",
        "ray_sere_dispatch_bytes_before_total",
    }


def test_dashboard_places_panels_side_by_side_under_their_rows():
    panels = json.loads(json.dumps(DASHBOARD.render()))["panels"]
    assert [p["id"] for p in panels] == list(range(1, len(panels) + 1))
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] <= place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_alerts_say_what_is_wrong_what_to_do_and_where_it_is_explained():
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)
    for alert in ALERTS:
        assert alert.severity in ("warning", "critical")
        assert alert.anchor == f"docs/operate.md#{alert.name.lower()}"
        assert min(len(alert.summary), len(alert.action)) > 20


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not():
    fires, quiet = set(), set()
    for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"]:
        for case in test.get("alert_rule_test", []):
            (fires if case["exp_alerts"] else quiet).add(case["alertname"])
    names = {alert.name for alert in ALERTS}
    assert fires == names
    assert quiet == names


@promtool
def test_unit_tests_of_the_rules():
    done = subprocess.run(
        ["promtool", "test", "rules", str(UNIT_TESTS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_prometheus_takes_configuration_and_rules():
    done = subprocess.run(
        ["promtool", "check", "config", str(ROOT / "deploy/prometheus/prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
