"""The alerts of ``rules.py`` as rules that Grafana evaluates itself."""

from typing import Any

from sere_ray.observe.alerts import ALERTS, Alert

FOLDER = {"uid": "sere-ray", "title": "sere-ray"}
GROUP = "sere-alerts"
INTERVAL_SECONDS = 60
_LOOK_BACK_SECONDS = 600


def rule_group(data_source_uid: str) -> dict[str, Any]:
    """Name and rules of the group, as Grafana's provisioning takes them."""
    return {"name": GROUP, "rules": [_rule(alert, data_source_uid) for alert in ALERTS]}


def _rule(alert: Alert, data_source_uid: str) -> dict[str, Any]:
    return {
        "uid": alert.name.lower(),
        "title": alert.name,
        "condition": "B",
        "data": [_query(alert, data_source_uid), _every_series()],
        "noDataState": "OK",  # no series: nothing is wrong
        "execErrState": "Error",
        "for": alert.lasting,
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": _grafana_template(alert.summary),
            "action": alert.action,
            "runbook": alert.anchor,
        },
        "isPaused": False,
    }


def _query(alert: Alert, data_source_uid: str) -> dict[str, Any]:
    return {
        "refId": "A",
        "relativeTimeRange": {"from": _LOOK_BACK_SECONDS, "to": 0},
        "datasourceUid": data_source_uid,
        "model": {"refId": "A", "instant": True, "expr": alert.expr},
    }


def _every_series() -> dict[str, Any]:
    """Prometheus fires for every series that an expression returns, whatever its value."""
    model = {"refId": "B", "type": "math", "expression": "is_number($A)"}
    return {"refId": "B", "datasourceUid": "__expr__", "model": model}


def _grafana_template(text: str) -> str:
    """``$value`` is a text about all queries in Grafana; the number is ``$values.A.Value``."""
    return text.replace("$value ", "$values.A.Value ")
