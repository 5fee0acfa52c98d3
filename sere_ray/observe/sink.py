"""Where metrics go: Ray's metrics agent of this node."""

from collections.abc import Mapping
from typing import Any, Protocol

from sere_ray.observe.metrics import Metric


class Sink(Protocol):
    """Takes values of metrics."""

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        """Add to a counter, set a gauge, or observe in a histogram."""
        ...


class RaySink:
    """Ray's instruments, each made when it is first used.

    Args:
        labels: that all metrics of this process share; a metric takes those it has.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._instruments: dict[str, Any] = {}

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        """See :class:`Sink`.

        Not ``Counter.inc``, which refuses 0: a counter that does not start at 0 hides its first
        event from Prometheus' ``increase``.
        """
        if metric.name not in self._instruments:
            self._instruments[metric.name] = _instrument(metric, self._labels)
        self._instruments[metric.name]._record(float(value), labels)


def _instrument(metric: Metric, labels: Mapping[str, str]) -> Any:
    from ray.util import metrics

    shared = {key: value for key, value in labels.items() if key in metric.labels}
    arguments = {"description": metric.formula, "tag_keys": metric.labels}
    if metric.kind == "histogram":
        instrument = metrics.Histogram(metric.name, boundaries=list(metric.boundaries), **arguments)
    elif metric.kind == "counter":
        instrument = metrics.Counter(metric.name, **arguments)
    else:
        instrument = metrics.Gauge(metric.name, **arguments)
    return instrument.set_default_tags(shared)
