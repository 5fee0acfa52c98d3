"""Counters of an engine become metrics that only grow; what cannot be counted is absent."""

import pytest

from sere_ray.observe import metrics, metrics_score
from sere_ray.observe.export import EngineExporter
from sere_ray.observe.metrics import layer_buckets
from sere_ray.observe.score import KEEP_VERSIONS, Scores, TokenScore
from sere_ray.policy.tiers import TIERS
from tests.observe.recorded import Recorded

LAYERS = [0, 1, 2, 3, 5]
TOKEN = TokenScore(served=-0.5, exact=-0.75, agrees=True)
POLICY = {"rule": "sere", "mode": "on", "union": "global", "select_top_k": 2}


def counters(steps, scale=1, **changes):
    """Of an engine with K = 4: a step has 4 rows, 3 decode; layer i names 10 + i, reads 5 + i."""
    kind = {
        "steps": steps,
        "steps_counted": steps,
        "rows": 4 * steps,
        "decode_rows": 3 * steps,
        "forward_seconds": 0.25 * steps,
        "experts_before": [steps * scale * (10 + i) for i in range(5)],
        "experts_after": [steps * scale * (5 + i) for i in range(5)],
        "slots_rerouted": [steps * i for i in range(5)],
        "slots_merged": [steps] * 5,
        "slots_masked": [2 * steps] * 5,
        "critical_kept": [steps] * 5,
        "beyond_range": [steps] * 5,
        "experts_max_rank_before": [steps * 8] * 5,
        "experts_max_rank_after": [steps * 4] * 5,
        "bytes_dispatched_before": [steps * 100] * 5,
        "bytes_dispatched_after": [steps * 60] * 5,
        **changes,
    }
    nothing = {
        name: [0] * 5 if isinstance(value, list) else value and 0 for name, value in kind.items()
    }
    return {"layers": LAYERS, "top_k": 4, "policy": {}, "decode_only": kind, "mixed": nothing}


@pytest.fixture
def recorded():
    return Recorded()


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ([], []),
        ([3], ["3"]),
        ([1, 2], ["1", "2"]),
        ([0, 1, 2, 3], ["0", "1", "2", "3"]),
        (LAYERS, ["0-1", "0-1", "2", "3", "5"]),
        (list(range(48)), ["0-11"] * 12 + ["12-23"] * 12 + ["24-35"] * 12 + ["36-47"] * 12),
    ],
)
def test_layers_come_in_at_most_four_buckets(layers, names):
    assert layer_buckets(layers) == names


def test_metrics_grow_by_what_was_counted_since_the_last_reading(recorded):
    exporter = EngineExporter(recorded)
    exporter.export_counters(counters(2), 0.001)
    exporter.export_counters(counters(6), 0.002)
    decode = {"kind": "decode_only"}
    assert recorded.of(metrics.STEPS, **decode) == 6
    assert recorded.of(metrics.ROWS, **decode) == 24
    assert recorded.of(metrics.DECODE_ROWS, **decode) == 18
    assert recorded.of(metrics.FORWARD_SECONDS, **decode) == 1.5
    assert recorded.of(metrics.SLOTS, **decode) == 18 * 4 * 5
    assert recorded.of(metrics.BYTES_BEFORE, **decode) == 3000
    assert recorded.of(metrics.BYTES_AFTER, **decode) == 1800
    assert recorded.of(metrics.LAYER_STEPS, **decode, layers="0-1") == 12
    assert recorded.of(metrics.LAYER_STEPS, **decode, layers="5") == 6
    assert recorded.of(metrics.EXPERTS_BEFORE, **decode, layers="0-1") == 6 * 21
    assert recorded.of(metrics.EXPERTS_AFTER, **decode, layers="2") == 6 * 7
    assert recorded.of(metrics.SLOTS_REROUTED, **decode, layers="5") == 6 * 4
    assert recorded.of(metrics.CRITICAL_KEPT, **decode, layers="0-1") == 12
    assert recorded.of(metrics.MAX_RANK_BEFORE, **decode, layers="3") == 48
    assert recorded.of(metrics.MAX_RANK_AFTER, **decode, layers="3") == 24
    assert recorded.of(metrics.READ_SECONDS) == 0.002


def test_means_are_of_the_steps_between_two_readings(recorded):
    exporter = EngineExporter(recorded)
    exporter.export_counters(counters(2), 0.001)
    exporter.export_counters(counters(6, scale=2), 0.001)
    assert recorded.of(metrics.BATCH_SIZE) == 4
    assert recorded.of(metrics.STEP_SECONDS) == 0.25
    # Layer 2 (i = 2) named 12 experts in each of 2 steps, then (6 * 24 - 2 * 12) / 4 on average.
    assert recorded.of(metrics.EXPERTS_READ_BEFORE, layers="2") == [12, 30]
    assert len(recorded.of(metrics.EXPERTS_READ_AFTER, layers="0-1")) == 4  # 2 layers, 2 readings


def test_without_a_step_nothing_is_observed_and_the_batch_is_empty(recorded):
    exporter = EngineExporter(recorded)
    exporter.export_counters(counters(2), 0.001)
    exporter.export_counters(counters(2), 0.001)
    assert recorded.of(metrics.BATCH_SIZE) == 0
    assert recorded.of(metrics.STEP_SECONDS) == 0.25
    assert recorded.of(metrics.EXPERTS_READ_BEFORE, layers="2") == [12]


def test_steps_under_mode_off_are_no_steps_of_the_expert_counts(recorded):
    EngineExporter(recorded).export_counters(counters(4, steps_counted=0), 0.001)
    assert recorded.of(metrics.STEPS, kind="decode_only") == 4
    assert recorded.of(metrics.LAYER_STEPS, kind="decode_only", layers="2") == 0
    assert not recorded.values[metrics.EXPERTS_READ_BEFORE.name]


def test_what_an_engine_cannot_count_is_absent(recorded):
    missing = ("forward_seconds", "experts_max_rank_before", "bytes_dispatched_after")
    EngineExporter(recorded).export_counters(counters(4, **dict.fromkeys(missing)), 0.001)
    for metric in (
        metrics.FORWARD_SECONDS,
        metrics.STEP_SECONDS,
        metrics.MAX_RANK_BEFORE,
        metrics.BYTES_AFTER,
    ):
        assert not recorded.values[metric.name], metric.name
    assert recorded.values[metrics.MAX_RANK_AFTER.name]


def test_an_earlier_policy_and_artifact_fall_to_zero(recorded):
    exporter = EngineExporter(recorded)
    exporter.export_policy(POLICY, "a" * 64, staged=3, settled=2, ranks=2)
    exporter.export_policy({**POLICY, "mode": "off"}, "b" * 64, staged=4, settled=4, ranks=2)
    labels = {"rule": "sere", "union": "global"}
    assert recorded.of(metrics.POLICY_INFO, mode="on", **labels) == 0
    assert recorded.of(metrics.POLICY_INFO, mode="off", **labels) == 1
    assert recorded.of(metrics.ARTIFACT_INFO, sha256="a" * 12) == 0
    assert recorded.of(metrics.ARTIFACT_INFO, sha256="b" * 12) == 1
    assert recorded.of(metrics.POLICY_VERSION) == recorded.of(metrics.SETTLED_VERSION) == 4
    assert recorded.of(metrics.SELECT_TOP_K) == 2
    assert recorded.of(metrics.RANKS) == 2


def test_scores_grow_by_what_was_scored_since_the_last_reading(recorded):
    exporter, scores = EngineExporter(recorded), Scores()
    exporter.export_scores(None)
    assert not recorded.values, "where nothing is scored there is no metric"
    exporter.export_scores(scores.report())
    assert recorded.of(metrics_score.SCORE_ANSWERS, outcome="no_room") == 0
    for version in (3, 3, 4):
        scores.add(version, "default", [TOKEN, TOKEN])
        scores.count("no_room")
        exporter.export_scores(scores.report())
    assert recorded.of(metrics_score.SCORE_ANSWERS, outcome="scored") == 3
    assert recorded.of(metrics_score.SCORE_ANSWERS, outcome="no_room") == 3
    assert recorded.of(metrics_score.SCORE_TOKENS, tier="default") == 6
    assert recorded.of(metrics_score.SCORE_TOKENS, tier="exact") == 0
    assert recorded.of(metrics_score.SCORE_SERVED, tier="default") == pytest.approx(3.0)
    assert recorded.of(metrics_score.SCORE_EXACT, tier="default") == pytest.approx(4.5)
    assert recorded.of(metrics_score.SCORE_AGREED, tier="default") == 6
    for version in ("3", "4"):
        of_version = {"tier": "default", "version": version}
        assert recorded.of(metrics_score.SCORE_NATS, **of_version) == pytest.approx(0.25)
        assert recorded.of(metrics_score.SCORE_AGREEMENT, **of_version) == 1


def test_a_rank_exports_no_more_series_than_stated(recorded):
    exporter = EngineExporter(recorded)
    exporter.export_counters(counters(4), 0.001)
    exporter.export_policy(POLICY, "a" * 64, staged=3, settled=2, ranks=2)
    scores = Scores()
    for version in range(2 * KEEP_VERSIONS):
        for tier in TIERS:
            scores.add(version, tier, [TOKEN])
    exporter.export_scores(scores.report())
    of_rank = [m for m in metrics.METRICS if m.source == "replica"]
    assert {m.name for m in of_rank} == recorded.values.keys()
    series = sum(
        len(recorded.values[m.name]) * (len(m.boundaries) + 3 if m.kind == "histogram" else 1)
        for m in of_rank
    )
    assert series <= metrics.MAX_SERIES_PER_RANK
    assert all(set(labels) <= set(m.labels) for m in of_rank for labels in _labels(recorded, m))


def _labels(recorded, metric):
    return [[key for key, _ in labels] for labels in recorded.values[metric.name]]
