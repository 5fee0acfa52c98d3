"""Recording rules and alerts for Prometheus, as data; ``sere-ray dashboards render`` writes them.

A mean is a ratio of two rates: over WINDOW, summed before it is divided. Sums of Ray's histograms
are not used: its agent rebuilds them from the middles of buckets. Their counts are exact.
"""

from dataclasses import dataclass, field
from typing import Any

WINDOW = "2m"
"""Time over which rates are taken: it holds several readings of the counters, exports of Ray's
agent (one each 10 s) and scrapes."""
TTFT_SECONDS, TPOT_SECONDS = "1.0", "0.1"
"""Limits of goodput and of the alert SereStepSlow: bounds of vLLM's buckets, spelt as vLLM does."""
RANK_HOUR_PRICE = 2.0
"""US dollars for a rank and hour: replace it by yours."""
RUNBOOK = "docs/operate.md"


@dataclass(frozen=True)
class Recording:
    """A recording rule."""

    record: str
    expr: str
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Alert:
    """An alert rule.

    Attributes:
        name: its lower-case form is the anchor in the runbook.
        expr: a series for everything that is wrong.
        lasting: how long before it fires.
        severity: ``critical``: answers may be wrong or missing; ``warning``: look at it today.
        summary: what is wrong; Prometheus fills in ``{{ ... }}``.
        action: the first thing to do.
    """

    name: str
    expr: str
    lasting: str
    severity: str
    summary: str
    action: str

    @property
    def anchor(self) -> str:
        """The place of the runbook that explains the alert."""
        return f"{RUNBOOK}#{self.name.lower()}"


def _ratio(upper: str, lower: str, by: str, *, where: str = 'kind="decode_only"') -> str:
    """PromQL: how much one counter grows for each unit of another; no value where the other one
    stands still."""
    above = f"sum by ({by}) (rate(ray_sere_{upper}_total{{{where}}}[{WINDOW}]))"
    below = f"sum by ({by}) (rate(ray_sere_{lower}_total{{{where}}}[{WINDOW}]))"
    return f"{above} / ({below} > 0)"


_RANK = "app, gang, rank"
SERE_RECORDINGS = (
    Recording("sere:experts_before:mean", _ratio("experts_before", "layer_steps", "app")),
    Recording("sere:experts_after:mean", _ratio("experts_after", "layer_steps", "app")),
    Recording("sere:experts_saved:share", "1 - sere:experts_after:mean / sere:experts_before:mean"),
    Recording("sere:slots_rerouted:share", _ratio("slots_rerouted", "slots", "app", where="")),
    Recording("sere:slots_merged:share", _ratio("slots_merged", "slots", "app", where="")),
    Recording("sere:decode_rows:share", _ratio("decode_rows", "rows", "app", where="")),
    Recording("sere:critical_kept:share", _ratio("critical_kept", "experts_after", "app")),
    Recording(
        # An expert lives on one rank, so the mean over ranks is the union over their number.
        "sere:experts_max_rank:ratio",
        f"{_ratio('experts_max_rank_after', 'experts_after', 'app')} "
        "* max by (app) (ray_sere_gang_ranks)",
    ),
    Recording("sere:step_seconds:mean", _ratio("forward_seconds", "steps", _RANK)),
    Recording("sere:batch_size:mean", _ratio("rows", "steps", _RANK)),
    Recording(
        "sere:dispatch_bytes:rate",
        f"sum by (app) (rate(ray_sere_dispatch_bytes_total[{WINDOW}]))",
    ),
)


def _vllm_rate(name: str, by: str = "model_name", where: str = "") -> str:
    return f"sum by ({by}) (rate(ray_vllm_{name}{where}[{WINDOW}]))"


def _share_within(name: str, seconds: str) -> str:
    within = _vllm_rate(f"{name}_bucket", where=f'{{le="{seconds}"}}')
    return f"{within} / ({_vllm_rate(f'{name}_count')} > 0)"


def _quantile(name: str, quantile: float) -> str:
    buckets = _vllm_rate(f"{name}_bucket", "model_name, le")
    return f"histogram_quantile({quantile}, {buckets})"


_TTFT, _TPOT = "time_to_first_token_seconds", "request_time_per_output_token_seconds"
_ITL = "inter_token_latency_seconds"
_OUTPUT = _vllm_rate("generation_tokens_total")
_COST_PER_SECOND = 'llm_total_hourly_cost{cost_basis="allocation"} / 3600'


def serving_recordings(rank_hour_price: float) -> tuple[Recording, ...]:
    """Latency, goodput and cost, of vLLM's metrics; the names of cost are llm-d's.

    Goodput is a lower bound: which request meets both objectives is not in two histograms, but at
    least the share of the one plus that of the other minus 1 does. ``phase="generation"`` puts all
    cost on output tokens (llm-d splits it by compute time, so ``allocation_method`` differs);
    without ``phase`` it is that of all tokens, as there.
    """
    allocation = {"cost_basis": "allocation"}
    both = f"{_OUTPUT} + {_vllm_rate('prompt_tokens_total')}"
    return (
        Recording("sere:ttft_seconds:p50", _quantile(_TTFT, 0.5)),
        Recording("sere:ttft_seconds:p99", _quantile(_TTFT, 0.99)),
        Recording("sere:tpot_seconds:p50", _quantile(_TPOT, 0.5)),
        Recording("sere:tpot_seconds:p99", _quantile(_TPOT, 0.99)),
        Recording("sere:itl_seconds:p50", _quantile(_ITL, 0.5)),
        Recording("sere:itl_seconds:p99", _quantile(_ITL, 0.99)),
        Recording("sere:output_tokens:rate", _OUTPUT),
        Recording("sere:requests:rate", _vllm_rate("request_success_total")),
        Recording("sere:ttft_met:share", _share_within(_TTFT, TTFT_SECONDS)),
        Recording("sere:tpot_met:share", _share_within(_TPOT, TPOT_SECONDS)),
        Recording(
            "sere:goodput_requests:rate",
            "sere:requests:rate * clamp_min(sere:ttft_met:share + sere:tpot_met:share - 1, 0)",
        ),
        Recording("sere:rank_hour_price:dollars", f"vector({rank_hour_price})"),
        Recording(
            "llm_total_hourly_cost",
            "count by (model_name) (ray_sere_gang_ranks) * scalar(sere:rank_hour_price:dollars)",
            allocation,
        ),
        Recording(
            "llm_cost_per_million_tokens",
            f"1e6 * sum by (model_name) ({_COST_PER_SECOND}) / ({both} > 0)",
            allocation,
        ),
        Recording(
            "llm_cost_per_million_tokens",
            f"1e6 * sum by (model_name) ({_COST_PER_SECOND}) / ({_OUTPUT} > 0)",
            {**allocation, "phase": "generation", "allocation_method": "output_only"},
        ),
    )


_RUNS_RULE = 'and on (app) (max by (app) (ray_sere_policy_info{mode="on"}) == 1)'


def _grown(counter: str, window: str) -> str:
    return f"increase(ray_sere_{counter}_total[{window}])"


ALERTS = (
    Alert(
        "SereNoMetrics",
        "absent(ray_sere_policy_version)",
        "5m",
        "critical",
        "No replica exports metrics of sere-ray.",
        "Check that the deployment runs and that Prometheus reaches the metrics port of its nodes.",
    ),
    Alert(
        "SereRankSilent",
        "count by (app, gang) (ray_sere_gang_ranks) < max by (app, gang) (ray_sere_gang_ranks)",
        "5m",
        "warning",
        "Only {{ $value }} ranks of gang {{ $labels.gang }} export metrics.",
        "Look for 'no metrics now' in the log of the missing rank; if it is gone, Serve restarts "
        "its gang.",
    ),
    Alert(
        "SereArtifactMismatch",
        "count by (app) (count by (app, sha256) (ray_sere_artifact_info == 1)) > 1",
        "2m",
        "critical",
        "Replicas of {{ $labels.app }} run {{ $value }} different similarity artifacts.",
        "Compare the label sha256 of ray_sere_artifact_info by replica; set the artifact again, or "
        "restart the gang that lags.",
    ),
    Alert(
        "SerePolicyLag",
        "max by (app) (ray_sere_router_policy_version) "
        "- on (app) min by (app) (ray_sere_policy_settled_version) > 0",
        "2m",
        "warning",
        "A gang of {{ $labels.app }} is {{ $value }} policy versions behind.",
        "Compare replicas and replicas_settled in `sere-ray policy get`; restart the gang that "
        "does not follow.",
    ),
    Alert(
        "SereReroutedShareHigh",
        f"sere:slots_rerouted:share > 0.5 {_RUNS_RULE}",
        "10m",
        "warning",
        "{{ $value | humanizePercentage }} of the slots of {{ $labels.app }} are re-routed: "
        "quality is at risk.",
        "Raise select_top_k, or set a threshold: `sere-ray policy set threshold=0.3`.",
    ),
    Alert(
        "SereNothingSaved",
        f"sere:experts_saved:share < 0.02 {_RUNS_RULE} "
        "and on (app) max by (app) (sere:batch_size:mean) >= 4",
        "15m",
        "warning",
        "Re-routing is on for {{ $labels.app }} and reads only {{ $value | humanizePercentage }} "
        "fewer experts.",
        "select_top_k, threshold or min_primary_experts keep almost all experts: lower them, or "
        "set mode=off.",
    ),
    Alert(
        "SereRankImbalance",
        "sere:experts_max_rank:ratio > 2",
        "15m",
        "warning",
        "The busiest rank of {{ $labels.app }} reads {{ $value | humanize }} times the mean.",
        "Every step waits for that rank: check where experts are placed.",
    ),
    Alert(
        "SereGangRestarted",
        f"{_grown('gang_restarts', '15m')} > 0",
        "0m",
        "warning",
        "{{ $labels.app }} lost a gang in the last 15 minutes.",
        "Read the log of the rank that died first; with one gang there was an outage.",
    ),
    Alert(
        "SereRequestsRefused",
        'sum by (app, status) (rate(ray_sere_requests_refused_total{status=~"429|5.."}[5m])) > 0.1',
        "5m",
        "warning",
        "{{ $labels.app }} answers {{ $labels.status }} {{ $value | humanize }} times a second.",
        "429: raise the limits under `access` or add gangs. 503: see whether a gang is restarting.",
    ),
    Alert(
        "SereStepSlow",
        f"max by (app) (sere:step_seconds:mean) > {TPOT_SECONDS} "
        f"or sere:itl_seconds:p50 > {TPOT_SECONDS}",
        "10m",
        "warning",
        "A decode step takes {{ $value | humanizeDuration }}: longer than a token may take.",
        "Compare batch size and experts read with yesterday's; re-route more, or add gangs.",
    ),
)


def recording_groups(rank_hour_price: float = RANK_HOUR_PRICE) -> dict[str, Any]:
    """The content of a rule file of Prometheus."""
    groups = (("sere", SERE_RECORDINGS), ("sere-serving", serving_recordings(rank_hour_price)))
    return {
        "groups": [
            {"name": name, "rules": [_recording(rule) for rule in recordings]}
            for name, recordings in groups
        ]
    }


def _recording(rule: Recording) -> dict[str, Any]:
    labels = {"labels": rule.labels} if rule.labels else {}
    return {"record": rule.record, "expr": rule.expr, **labels}


def alert_groups() -> dict[str, Any]:
    """The alert rules, in the form of a Prometheus rule file."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.lasting,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": alert.summary,
                "action": alert.action,
                "runbook": alert.anchor,
            },
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "sere-alerts", "rules": rules}]}


def recorded_names() -> set[str]:
    """Names that the recording rules make."""
    return {r.record for r in (*SERE_RECORDINGS, *serving_recordings(RANK_HOUR_PRICE))}
