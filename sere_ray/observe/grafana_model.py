"""Plain builders of Grafana's dashboard JSON: rows of panels, each a few PromQL expressions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Look = Literal["timeseries", "stat", "state-timeline", "heatmap"]

DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
"""The data source that the reader chooses in the dashboard."""
WIDTH = 24
"""Columns of Grafana's grid."""
SCHEMA_VERSION = 39  # Grafana 11


@dataclass(frozen=True)
class Query:
    """One expression and the name of its series."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel; ``unit`` is Grafana's name of it, ``text`` what the reader may conclude."""

    title: str
    text: str
    unit: str
    queries: tuple[Query, ...]
    look: Look = "timeseries"
    red_above: float | None = None

    def render(self, number: int, x: int, y: int, width: int, height: int) -> dict[str, Any]:
        """Grafana's JSON of it at a place of the grid."""
        steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
        if self.red_above is not None:
            steps.append({"color": "red", "value": self.red_above})
        return {
            "id": number,
            "type": self.look,
            "title": self.title,
            "description": self.text,
            "datasource": DATA_SOURCE,
            "gridPos": {"x": x, "y": y, "w": width, "h": height},
            "fieldConfig": {
                "defaults": {
                    "unit": self.unit,
                    "thresholds": {"mode": "absolute", "steps": steps},
                },
                "overrides": [],
            },
            "options": {},
            "targets": [self._target(query, chr(65 + i)) for i, query in enumerate(self.queries)],
        }

    def _target(self, query: Query, letter: str) -> dict[str, Any]:
        return {
            "refId": letter,
            "datasource": DATA_SOURCE,
            "expr": query.expr,
            "legendFormat": query.legend or "__auto",
            "format": "heatmap" if self.look == "heatmap" else "time_series",
        }


@dataclass(frozen=True)
class Row:
    """Panels beside each other under a heading."""

    title: str
    panels: tuple[Panel, ...]
    height: int = 7


@dataclass(frozen=True)
class Annotations:
    """Vertical marks: those that a Prometheus expression or a tag finds."""

    name: str
    colour: str
    expr: str | None = None
    tags: tuple[str, ...] = ()

    def render(self) -> dict[str, Any]:
        """Grafana's JSON of it."""
        common = {"name": self.name, "iconColor": self.colour, "enable": True}
        if self.expr is not None:
            return {
                **common,
                "datasource": DATA_SOURCE,
                "expr": self.expr,
                "titleFormat": self.name,
            }
        target = {"type": "tags", "tags": list(self.tags), "matchAny": False, "limit": 100}
        return {
            **common,
            "datasource": {"type": "grafana", "uid": "-- Grafana --"},
            "target": target,
        }


@dataclass(frozen=True)
class Dashboard:
    """A dashboard; the variable ``app`` holds the application's name."""

    uid: str
    title: str
    rows: tuple[Row, ...]
    annotations: tuple[Annotations, ...]
    applications: str
    """Metric whose label ``app`` lists the applications."""

    def render(self) -> dict[str, Any]:
        """Grafana's JSON of it."""
        return {
            "uid": self.uid,
            "title": self.title,
            "tags": ["sere-ray"],
            "schemaVersion": SCHEMA_VERSION,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "10s",
            "time": {"from": "now-30m", "to": "now"},
            "annotations": {"list": [a.render() for a in self.annotations]},
            "templating": {"list": [_data_source_variable(), _app_variable(self.applications)]},
            "panels": list(self._panels()),
        }

    def _panels(self) -> Iterator[dict[str, Any]]:
        number = y = 0
        for row in self.rows:
            number += 1
            yield {
                "id": number,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
                "panels": [],
            }
            width = WIDTH // len(row.panels)
            for i, panel in enumerate(row.panels):
                number += 1
                yield panel.render(number, i * width, y + 1, width, row.height)
            y += 1 + row.height


def _data_source_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "hide": 0,
    }


def _app_variable(metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, app)"
    return {
        "name": "app",
        "label": "Application",
        "type": "query",
        "datasource": DATA_SOURCE,
        "query": {"query": query, "refId": "apps"},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "hide": 0,
    }
