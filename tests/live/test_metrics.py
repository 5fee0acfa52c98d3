"""A real Prometheus scrapes the live deployment under a little load."""

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from sere_ray.observe.alerts import ALERTS
from sere_ray.observe.dashboards import DASHBOARD, expressions
from sere_ray.observe.metrics import MAX_SERIES_PER_RANK, METRICS, VLLM
from sere_ray.observe.prometheus import Prometheus, prometheus
from sere_ray.observe.rules import recorded_names
from sere_ray.util.ports import free_port
from tests.live.draw_panels import draw_panels
from tests.serve.deployment import wait_for

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is missing: apt install prometheus"
    ),
]
LOAD_SECONDS = 20
RAYS_OWN = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "instance", "job"}
"""Labels that Ray and Prometheus add; and some with the prefix otel_."""
SERIES_OF_VLLM = 400
"""Most series that vLLM's own metrics have for one rank."""


@dataclass
class Watched:
    """Prometheus, and when there was load."""

    server: Prometheus
    start: float
    end: float

    def query(self, expr):
        """At the end of the load."""
        return self.server.query(expr, at=self.end)

    def has_all(self):
        """A busy machine may be late with a scrape, and then every series of it has ended."""
        self.end = time.time()
        return self.query("ray_sere_step_seconds") and all(map(self.query, recorded_names()))


@pytest.fixture(scope="module")
def watched(live, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus(folder, live.metrics_port, free_port(), interval_s=2) as server:
        start = time.time()
        load(live, LOAD_SECONDS)
        watched = Watched(server, start, start)
        wait_for(watched.has_all, 60, "a scrape in time")
        yield watched


def load(live, seconds):
    """Six streams, and now and then somebody with a wrong key."""
    end = time.monotonic() + seconds

    def stream():
        while time.monotonic() < end:
            assert live.complete(max_tokens=64)[0] == 200

    threads = [threading.Thread(target=stream) for _ in range(6)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        assert live.complete(key="wrong")[0] == 401
        time.sleep(1)
    for thread in threads:
        thread.join()


def test_every_metric_is_there_with_its_type_and_labels(watched):
    kinds = {name: of[0]["type"] for name, of in watched.server.get("metadata").items()}

    def kind_of(name):
        """OpenMetrics, which the agent speaks, names a counter without its _total."""
        return kinds.get(name, kinds.get(name.removesuffix("_total")))

    wrong = {}
    for metric in METRICS:
        series = watched.query(
            f"{metric.exported}_count" if metric.kind == "histogram" else metric.exported
        )
        labels = {key for one in series for key in one["metric"]}
        labels = {key for key in labels - RAYS_OWN if not key.startswith(("otel_", "__"))}
        found = (len(series) > 0, kind_of(metric.exported), labels)
        if found != (True, metric.kind, set(metric.labels)):
            wrong[metric.exported] = found
    assert not wrong
    assert {name: kind_of(name) for name in VLLM} == VLLM


@pytest.mark.parametrize(
    ("panel", "expr"),
    expressions(DASHBOARD),
    ids=[f"{panel}-{i}" for i, (panel, _) in enumerate(expressions(DASHBOARD))],
)
def test_every_panel_has_data(watched, panel, expr):
    values = [float(one["value"][1]) for one in watched.query(expr)]
    assert values, f"{panel}: no data for {expr}"
    assert all(value == value for value in values), f"{panel}: {values}"


def test_recording_rules_and_alerts_are_evaluated(watched):
    groups = watched.server.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == recorded_names() | {a.name for a in ALERTS}
    assert [rule for rule in rules if rule["health"] != "ok"] == []
    for name in recorded_names():
        assert watched.query(name), name


def test_prometheus_has_the_numbers_of_the_control_api(live, watched):
    total = live.sere("stats")["total"]["decode_only"]

    def sum_of(name, field):
        """Of one rank of the gang, as ``total`` is under a global union."""
        expr = f'sum(ray_sere_{name}_total{{kind="decode_only", rank="0"}})'
        return float(watched.server.query(expr)[0]["value"][1]) == sum(total[field])

    for field in ("experts_before", "experts_after"):
        wait_for(lambda field=field: sum_of(field, field), 20, field)
    assert total["experts_after"] < total["experts_before"]
    (saved,) = watched.query("sere:experts_saved:share")
    assert 0.1 < float(saved["value"][1]) < 0.9


def test_series_are_as_few_as_stated(watched):
    for rank in ("0", "1"):
        (count,) = watched.query(f'count({{__name__=~"ray_sere_.+", rank="{rank}"}})')
        assert int(count["value"][1]) <= MAX_SERIES_PER_RANK
    (count,) = watched.query('count({__name__=~"ray_vllm_.+"})')
    assert int(count["value"][1]) <= 2 * SERIES_OF_VLLM


def test_picture_of_panels(watched, tmp_path, request):
    picture = tmp_path / "panels.png"
    draw_panels(watched.server, watched.start, watched.end, picture)
    assert 20_000 < picture.stat().st_size < 180_000
    if request.config.getoption("--write-pictures"):
        shutil.copy(picture, Path(__file__).parents[2] / "docs" / "pictures" / "panels.png")
