"""The files under ``deploy/`` that are made from the definitions here."""

import json
from pathlib import Path
from typing import Any

import yaml

from sere_ray.observe.alerts import alert_groups
from sere_ray.observe.dashboards import DASHBOARD
from sere_ray.observe.grafana_alerts import FOLDER, rule_group
from sere_ray.observe.metrics import METRICS
from sere_ray.observe.rules import RANK_HOUR_PRICE, recording_groups
from sere_ray.util.files import atomic_path

DATA_SOURCE_UID = "sere-prometheus"
_HEAD = "# Made by `sere-ray dashboards render`; a test keeps it equal. Edit sere_ray/observe/.\n"


def rendered(rank_hour_price: float = RANK_HOUR_PRICE) -> dict[str, str]:
    """The content of each file, by its path below the folder.

    Args:
        rank_hour_price: US dollars for a rank and hour, for the cost rules.
    """
    provisioned = {
        "apiVersion": 1,
        "groups": [
            {**rule_group(DATA_SOURCE_UID), "orgId": 1, "folder": FOLDER["title"], "interval": "1m"}
        ],
    }
    recording, alerts = recording_groups(rank_hour_price), alert_groups()
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "sere-ray"},
        "spec": {"groups": [*recording["groups"], *alerts["groups"]]},
    }
    return {
        "prometheus/recording.yml": _yaml(recording),
        "prometheus/alerts.yml": _yaml(alerts),
        "prometheus/operator/prometheus-rule.yml": _yaml(rule),
        "grafana/dashboards/sere-ray.json": json.dumps(DASHBOARD.render(), indent=1) + "\n",
        "grafana/provisioning/alerting/sere-ray.yml": _yaml(provisioned),
    }


def write(folder: Path, rank_hour_price: float = RANK_HOUR_PRICE) -> list[Path]:
    """Write the files; each is replaced in one step."""
    written = []
    for name, content in rendered(rank_hour_price).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(content)
        written.append(path)
    return written


def metrics_table() -> str:
    """The table of ``docs/operate.md``."""
    lines = ["| metric | type, unit | labels | from | what it counts |", "|---|---|---|---|---|"]
    lines += [
        f"| `{metric.exported}` | {metric.kind}, {metric.unit} | {', '.join(metric.labels)} "
        f"| {metric.source} | {metric.formula} |"
        for metric in METRICS
    ]
    return "\n".join(lines) + "\n"


def _yaml(content: dict[str, Any]) -> str:
    return _HEAD + yaml.safe_dump(content, sort_keys=False, width=100)
