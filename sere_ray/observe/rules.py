"""Recording rules for Prometheus, as data; ``sere-ray dashboards render`` writes them.

A mean is a ratio of two rates: over WINDOW, summed before it is divided. Sums of Ray's histograms
are not used: its agent rebuilds them from the middles of buckets. Their counts are exact.
"""

from dataclasses import dataclass, field
from typing import Any

WINDOW = "2m"
"""Time over which rates are taken: it holds several readings of the counters, exports of Ray's
agent (one each 10 s) and scrapes."""
SCORE_WINDOW = "1h"
"""The same for scores: few answers are sampled."""
TTFT_SECONDS, TPOT_SECONDS = "1.0", "0.1"
"""Limits of goodput and of the alert SereStepSlow: bounds of vLLM's buckets, spelt as it does."""
RANK_HOUR_PRICE = 2.0
"""US dollars for a rank and hour: replace it by yours."""


@dataclass(frozen=True)
class Recording:
    """A recording rule."""

    record: str
    expr: str
    labels: dict[str, str] = field(default_factory=dict)


def _ratio(upper: str, lower: str, by: str, *, where: str = 'kind="decode_only"') -> str:
    """PromQL: how much one counter grows for each unit of another; no value where the other one
    stands still."""
    above = f"sum by ({by}) (rate(ray_sere_{upper}_total{{{where}}}[{WINDOW}]))"
    below = f"sum by ({by}) (rate(ray_sere_{lower}_total{{{where}}}[{WINDOW}]))"
    return f"{above} / ({below} > 0)"


def _score_sum(counter: str) -> str:
    return f"sum by (app, tier) (rate(ray_sere_score_{counter}_total[{SCORE_WINDOW}]))"


_RANK = "app, gang, rank"
SERE_RECORDINGS = (
    Recording("sere:experts_before:mean", _ratio("experts_before", "layer_steps", "app")),
    Recording("sere:experts_after:mean", _ratio("experts_after", "layer_steps", "app")),
    Recording("sere:experts_saved:share", "1 - sere:experts_after:mean / sere:experts_before:mean"),
    Recording("sere:slots_rerouted:share", _ratio("slots_rerouted", "slots", "app", where="")),
    Recording("sere:slots_merged:share", _ratio("slots_merged", "slots", "app", where="")),
    Recording("sere:slots_masked:share", _ratio("slots_masked", "slots", "app", where="")),
    Recording("sere:decode_rows:share", _ratio("decode_rows", "rows", "app", where="")),
    Recording("sere:critical_kept:share", _ratio("critical_kept", "experts_after", "app")),
    Recording("sere:beyond_range:share", _ratio("beyond_range", "layer_steps", "app")),
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
    Recording(
        "sere:score:nats",
        f"({_score_sum('exact_nats')} - {_score_sum('served_nats')}) "
        f"/ ({_score_sum('tokens')} > 0)",
    ),
    Recording("sere:score_agreed:share", f"{_score_sum('agreed')} / ({_score_sum('tokens')} > 0)"),
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


def recorded_names() -> set[str]:
    """Names that the recording rules make."""
    return {r.record for r in (*SERE_RECORDINGS, *serving_recordings(RANK_HOUR_PRICE))}
