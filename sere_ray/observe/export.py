"""Metrics on their way out: what a replica exports, and Ray's agent that takes it.

A replica exports its engine's counters as they grow (:class:`EngineExporter`). Every process that
has metrics hands them to a :class:`Sink`; :class:`RaySink` is the one of a deployment.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sere_ray.observe import metrics, metrics_score
from sere_ray.observe.metric import Metric
from sere_ray.observe.metrics import layer_buckets
from sere_ray.observe.score import scores_of
from sere_ray.observe.stats import STEP_KINDS

HASH_DIGITS = 12


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
        """Add to a counter, set a gauge, or observe in a histogram.

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


class EngineExporter:
    """Turns one engine's counters, which only grow, into metrics.

    Args:
        sink: where they go.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._last: Mapping[str, Any] = {}
        self._scores: Mapping[str, Any] = {"outcomes": {}, "tiers": {}}
        self._info: dict[str, dict[str, str]] = {}

    def export_counters(self, counters: Mapping[str, Any], read_seconds: float) -> None:
        """Export what was counted since the last call.

        Args:
            counters: of the engine since its start: ``EngineState.read_counters``.
            read_seconds: how long it took to read them.
        """
        buckets = layer_buckets(counters["layers"])
        for kind in STEP_KINDS:
            grown = _difference(counters[kind], self._last.get(kind, {}))
            self._export_kind(kind, grown, buckets, counters["top_k"])
            if kind == "decode_only":
                self._export_means(grown, buckets)
        self._last = counters
        self._sink.record(metrics.READ_SECONDS, read_seconds)

    def export_policy(
        self, policy: Mapping[str, Any], sha256: str, *, staged: int, settled: int, ranks: int
    ) -> None:
        """Export what the engine was told last, and the size of its gang."""
        self._sink.record(metrics.RANKS, ranks)
        self._sink.record(metrics.POLICY_VERSION, staged)
        self._sink.record(metrics.SETTLED_VERSION, settled)
        if policy["select_top_k"] is not None:  # not every rule has it
            self._sink.record(metrics.SELECT_TOP_K, policy["select_top_k"])
        labels = {name: str(policy[name]) for name in ("rule", "mode", "union")}
        self._export_info(metrics.POLICY_INFO, labels)
        self._export_info(metrics.ARTIFACT_INFO, {"sha256": sha256[:HASH_DIGITS]})

    def export_scores(self, scores: Mapping[str, Any] | None) -> None:
        """Export what was scored since the last call, and the newest versions' scores.

        Args:
            scores: ``Scores.report`` since the engine's start; None where nothing is scored.
        """
        if scores is None:
            return
        for outcome, grown in _difference(scores["outcomes"], self._scores["outcomes"]).items():
            self._sink.record(metrics_score.SCORE_ANSWERS, grown, outcome=outcome)
        for tier, sums in scores["tiers"].items():
            grown = _difference(sums, self._scores["tiers"].get(tier, {}))
            for field, metric in metrics_score.SCORE_SUMS.items():
                self._sink.record(metric, grown[field], tier=tier)
        for score in scores_of(scores):
            labels = {"tier": score["tier"], "version": str(score["version"])}
            self._sink.record(metrics_score.SCORE_NATS, score["nats"], **labels)
            self._sink.record(metrics_score.SCORE_AGREEMENT, score["agreement"], **labels)
        self._scores = scores

    def _export_info(self, metric: Metric, labels: dict[str, str]) -> None:
        """Set a metric to 1 for these labels, and to 0 for the last ones: Ray goes on exporting a
        series that is not set anew."""
        former = self._info.get(metric.name, labels)
        if former != labels:
            self._sink.record(metric, 0, **former)
        self._sink.record(metric, 1, **labels)
        self._info[metric.name] = labels

    def _export_kind(
        self, kind: str, grown: Mapping[str, Any], buckets: Sequence[str], top_k: int
    ) -> None:
        for field, metric in metrics.PER_KIND.items():
            if grown[field] is not None:
                self._sink.record(metric, grown[field], kind=kind)
        slots = grown["decode_rows"] * top_k * len(buckets)
        self._sink.record(metrics.SLOTS, slots, kind=kind)
        for field, metric in metrics.BYTES.items():
            if grown[field] is not None:
                self._sink.record(metric, sum(grown[field]), kind=kind)
        counted = [grown["steps_counted"]] * len(buckets)
        self._export_layers(metrics.LAYER_STEPS, kind, counted, buckets)
        for field, metric in metrics.PER_LAYER.items():
            if grown[field] is not None:
                self._export_layers(metric, kind, grown[field], buckets)

    def _export_layers(
        self, metric: Metric, kind: str, by_layer: Sequence[float], buckets: Sequence[str]
    ) -> None:
        sums: dict[str, float] = {}
        for value, bucket in zip(by_layer, buckets, strict=True):
            sums[bucket] = sums.get(bucket, 0) + value
        for bucket, value in sums.items():
            self._sink.record(metric, value, kind=kind, layers=bucket)

    def _export_means(self, grown: Mapping[str, Any], buckets: Sequence[str]) -> None:
        """Means over the steps since the last reading; steps in which every row decodes."""
        steps, seconds = grown["steps"], grown["forward_seconds"]
        self._sink.record(metrics.BATCH_SIZE, grown["rows"] / steps if steps else 0)
        if steps and seconds is not None:
            self._sink.record(metrics.STEP_SECONDS, seconds / steps)
        counted = grown["steps_counted"]
        if not counted:
            return
        for field, metric in (
            ("experts_before", metrics.EXPERTS_READ_BEFORE),
            ("experts_after", metrics.EXPERTS_READ_AFTER),
        ):
            for value, bucket in zip(grown[field], buckets, strict=True):
                self._sink.record(metric, value / counted, layers=bucket)


def _difference(now: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    """``now - last`` of numbers and of lists by layer; None stays None; others are left out."""
    result: dict[str, Any] = {}
    for field, value in now.items():
        before = last.get(field)
        if isinstance(value, list):
            result[field] = [a - b for a, b in zip(value, before or [0] * len(value), strict=True)]
        elif value is None or isinstance(value, int | float):
            result[field] = None if value is None else value - (before or 0)
    return result
