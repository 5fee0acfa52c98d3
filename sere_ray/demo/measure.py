"""Traffic through the endpoint under every policy, with the engine's own counters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sere_ray import assets
from sere_ray.demo.settings import problems_at
from sere_ray.demo.traffic import Served, send
from sere_ray.engine.control import experts_read
from sere_ray.evaluation.teacher_forced import Quality
from sere_ray.policy.policy import Policy
from sere_ray.serve.client import Deployment


@dataclass(frozen=True)
class Run:
    """One policy at one concurrency: a row of the table, of the JSON and of the plots."""

    rule: str
    """``off`` for stock."""
    select_top_k: int | None
    threshold: float | None
    concurrency: int
    experts_read: float
    """Mean distinct experts per layer and decode-only step, counted in the engine."""
    step_ms: float
    """Mean forward pass of a decode-only step, timed in the engine."""
    rows_per_step: float
    tokens_per_s: float
    """Output tokens over all streams, seen by the client."""
    accuracy: float
    """Share of arithmetic problems answered right, through the endpoint."""
    problems: int
    top1_agreement: float
    """Against the exact model on teacher-forced held-out rows."""
    kl_mean: float
    """KL(exact || re-routed), nats, on the same rows."""


def measure_runs(
    policies: list[Policy],
    concurrencies: Sequence[int],
    quality: Mapping[tuple[Policy, int], Quality],
    deployment: Deployment,
    base_url: str,
    model_id: str,
    on_point: Callable[[], object],
) -> list[Run]:
    """Send the same problems under every policy at every concurrency."""
    send(base_url, model_id, assets.arithmetic()[:16], 16)  # warm-up
    runs = []
    for concurrency in concurrencies:
        problems = assets.arithmetic()[: problems_at(concurrency)]

        def traffic(
            policy: Policy,
            problems: list[tuple[str, str]] = problems,
            concurrency: int = concurrency,
        ) -> tuple[Served, dict[str, Any]]:
            deployment.set_policy(policy)
            deployment.read_counters()
            return send(base_url, model_id, problems, concurrency), deployment.read_counters()

        for policy in policies:
            served, counters = traffic(policy)
            experts = experts_read(counters, "experts_after")
            if policy.mode == "off":  # `off` counts nothing; `observe` says what stock reads
                _, observed = traffic(policy.model_copy(update={"mode": "observe"}))
                experts = experts_read(observed, "experts_before")
            runs.append(_run(policy, concurrency, served, counters, experts, quality))
            on_point()
    return runs


def _run(
    policy: Policy,
    concurrency: int,
    served: Served,
    counters: dict[str, Any],
    experts: float,
    quality: Mapping[tuple[Policy, int], Quality],
) -> Run:
    decode = counters["decode_only"]
    steps = max(decode["steps"], 1)
    off = policy.mode == "off"
    score = quality[policy, concurrency]
    return Run(
        rule="off" if off else policy.rule,
        select_top_k=None if off else policy.select_top_k,
        threshold=policy.threshold,
        concurrency=concurrency,
        experts_read=round(experts, 2),
        step_ms=round(decode["forward_seconds"] / steps * 1e3, 3),
        rows_per_step=round(decode["decode_rows"] / steps, 2),
        tokens_per_s=round(served.tokens_per_s, 1),
        accuracy=round(served.accuracy, 4),
        problems=served.problems,
        top1_agreement=round(score.top1_agreement, 4),
        kl_mean=round(score.kl_mean, 5),
    )
