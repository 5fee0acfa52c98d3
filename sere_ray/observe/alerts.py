"""Alerts for Prometheus and Grafana, as data; ``sere-ray dashboards render`` writes them."""

from dataclasses import dataclass
from typing import Any

from sere_ray.observe.rules import SCORE_WINDOW, TPOT_SECONDS

RUNBOOK = "docs/operate.md"
SCORE_LIMIT, SCORE_LEAST = 0.2, 20
"""Score in nats a token, and scored answers in SCORE_WINDOW, above which SereScoreHigh fires."""


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
        "SereScoreHigh",
        f'sere:score:nats{{tier="default"}} > {SCORE_LIMIT} '
        'and on (app) sum by (app) (increase(ray_sere_score_answers_total{outcome="scored"}'
        f"[{SCORE_WINDOW}])) >= {SCORE_LEAST}",
        "10m",
        "warning",
        'Served tokens of {{ $labels.app }} are {{ $value | printf "%.2f" }} nats less likely to '
        "the exact model than they were when served.",
        "Answers differ from the exact model's: re-route less, or `sere-ray policy set mode=off`.",
    ),
    Alert(
        "SereBeyondRange",
        f"sere:beyond_range:share > 0.05 {_RUNS_RULE}",
        "10m",
        "warning",
        "{{ $value | humanizePercentage }} of the layer steps of {{ $labels.app }} give up more "
        "demand than any step that `loss` was measured on.",
        "Traffic is unlike that text, so the loss is not what the policy says: run `sere-ray "
        "strength` on text like it, or set guard=true.",
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
