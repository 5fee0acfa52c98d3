"""What the demo measures: which policies it compares, their quality, and traffic under each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sere_ray import assets
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.bench.demo_model import PROMPT_TOKENS, TOP_K, bound, heldout_windows
from sere_ray.calibration.loading import load_model
from sere_ray.demo.serving import Served, send
from sere_ray.engine.control import experts_read
from sere_ray.evaluation.teacher_forced import Quality, exact_logits, score
from sere_ray.policy.policy import Policy
from sere_ray.serve.client import Deployment

THRESHOLD = 0.3
"""Least similarity of a stand-in, in the policies that limit it."""


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


def policies(similarity: str) -> list[Policy]:
    """The policies that the demo compares: stock, and S = 2 and 1, each without and with threshold.

    Args:
        similarity: path of the artifact.
    """
    rerouted = [
        Policy.parse({"similarity": similarity, "select_top_k": size, "threshold": threshold})
        for size in (2, 1)
        for threshold in (None, THRESHOLD)
    ]
    off = Policy.parse({"similarity": similarity, "select_top_k": TOP_K, "mode": "off"})
    return [off, *rerouted]


def label(rule: str, select_top_k: int | None, threshold: float | None) -> str:
    """Short name of a policy in tables and plots."""
    if rule == "off":
        return "stock"
    return f"S={select_top_k}" + ("" if threshold is None else f", rho={threshold}")


def measure_quality(
    policies: list[Policy],
    batches: Sequence[int],
    artifact: SimilarityArtifact,
    on_point: Callable[[], object],
) -> dict[tuple[Policy, int], Quality]:
    """Score every policy at every decode batch size on held-out text, teacher-forced, in float32.

    It runs in this process, without an engine, and all policies see the same rows.

    Args:
        policies: to score.
        batches: decode batch sizes.
        artifact: of the demo model.
        on_point: called after each score.

    Returns:
        The quality, by policy and batch size.
    """
    model = load_model(
        str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32"
    )
    input_ids = heldout_windows()
    exact = exact_logits(model, input_ids, PROMPT_TOKENS)
    scores = {}
    for policy in policies:
        for batch in batches:
            scores[policy, batch] = score(
                model,
                input_ids,
                exact,
                bound(policy),
                artifact.layers,
                batch=batch,
                prompt_tokens=PROMPT_TOKENS,
            )
            on_point()
    return scores


def measure_runs(
    policies: list[Policy],
    concurrencies: Sequence[int],
    problems: int,
    quality: Mapping[tuple[Policy, int], Quality],
    deployment: Deployment,
    base_url: str,
    model_id: str,
    on_point: Callable[[], object],
) -> list[Run]:
    """Send the same arithmetic through the endpoint under every policy, at every concurrency.

    Args:
        policies: to compare.
        concurrencies: numbers of requests in flight.
        problems: how many are sent at most for each policy and concurrency.
        quality: from :func:`measure_quality`; goes into the rows.
        deployment: changes the policy and reads the engines' counters.
        base_url: of the endpoint; ends in ``/v1``.
        model_id: name of the served model.
        on_point: called after each policy and concurrency.

    Returns:
        One row for each policy and concurrency.
    """
    send(base_url, model_id, assets.arithmetic()[:16], 16)  # warm-up
    runs = []
    for concurrency in concurrencies:
        sent = assets.arithmetic()[: min(problems, problems_at(concurrency))]

        def traffic(
            policy: Policy,
            sent: list[tuple[str, str]] = sent,
            concurrency: int = concurrency,
        ) -> tuple[Served, dict[str, Any]]:
            deployment.set_policy(policy)
            deployment.read_counters()
            return send(base_url, model_id, sent, concurrency), deployment.read_counters()

        for policy in policies:
            served, counters = traffic(policy)
            experts = experts_read(counters, "experts_after")
            if policy.mode == "off":  # `off` counts nothing; `observe` says what stock reads
                _, observed = traffic(policy.model_copy(update={"mode": "observe"}))
                experts = experts_read(observed, "experts_before")
            runs.append(_run(policy, concurrency, served, counters, experts, quality))
            on_point()
    return runs


def problems_at(concurrency: int) -> int:
    """How many arithmetic problems are sent: few at low concurrency, where they take long."""
    return min(128, 12 * concurrency)


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
