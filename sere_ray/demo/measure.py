"""What the demo measures on its trained model: policies, their quality, traffic under each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sere_ray import assets
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.bench.demo_model import PROMPT_TOKENS, TOP_K, bound, heldout_windows
from sere_ray.calibration.loading import load_model
from sere_ray.demo.serving import Served, send
from sere_ray.engine.control import experts_read
from sere_ray.evaluation.decode_batches import DecodeBatches
from sere_ray.policy.policy import Policy
from sere_ray.serve.client import Deployment

TAUS = (0.01, 0.025)
"""Of `margin`: on the demo model at 16 streams, the experts that S = 2 reads, and its loss."""


@dataclass(frozen=True)
class Quality:
    """One policy at one decode batch size on held-out text, teacher-forced, in float32."""

    policy: str
    streams: int
    experts_read: float
    """Mean distinct experts per layer and decode step."""
    top1_agreement: float
    """Share of rows whose most likely next token is the exact model's."""
    kl_mean: float
    """KL(exact || re-routed) of next-token distributions, nats."""


@dataclass(frozen=True)
class Run:
    """One policy at one concurrency, served."""

    policy: str
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


def policies(similarity: str) -> list[Policy]:
    """The policies that the demo compares: stock, `margin` twice, and the published rule at S = 2.

    Args:
        similarity: path of the artifact.
    """
    common = {"similarity": similarity}
    return [
        Policy.parse({**common, "select_top_k": TOP_K, "mode": "off"}),
        *(Policy.parse({**common, "rule": "margin", "tau": tau}) for tau in TAUS),
        Policy.parse({**common, "select_top_k": 2}),
    ]


def label(policy: Policy) -> str:
    """Short name of a policy in tables and plots."""
    if policy.mode == "off":
        return "stock"
    return f"margin {policy.tau}" if policy.rule == "margin" else f"S={policy.select_top_k}"


def measure_quality(
    policies: Sequence[Policy],
    batches: Sequence[int],
    artifact: SimilarityArtifact,
    on_point: Callable[[], object],
) -> list[Quality]:
    """Score every policy at every decode batch size on held-out text.

    It runs in this process, without an engine, and all policies see the same rows.

    Args:
        policies: to score.
        batches: decode batch sizes.
        artifact: of the demo model.
        on_point: called after each score.
    """
    model = load_model(
        str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32"
    )
    texts = DecodeBatches(model, heldout_windows(), PROMPT_TOKENS, artifact.layers)
    found = []
    for batch in batches:
        for policy in policies:
            measured = texts.measure(bound(policy), batch)
            reads, same, loss = measured.reads, measured.agreement, measured.kl
            means = [round(float(values.mean()), 5) for values in (reads, same, loss)]
            found.append(Quality(label(policy), batch, *means))
            on_point()
    return found


def measure_runs(
    policies: list[Policy],
    concurrencies: Sequence[int],
    problems: int,
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
            runs.append(_run(policy, concurrency, served, counters, experts))
            on_point()
    return runs


def problems_at(concurrency: int) -> int:
    """How many arithmetic problems are sent: few at low concurrency, where they take long."""
    return min(128, 12 * concurrency)


def _run(
    policy: Policy, concurrency: int, served: Served, counters: dict[str, Any], experts: float
) -> Run:
    decode = counters["decode_only"]
    steps = max(decode["steps"], 1)
    return Run(
        policy=label(policy),
        concurrency=concurrency,
        experts_read=round(experts, 2),
        step_ms=round(decode["forward_seconds"] / steps * 1e3, 3),
        rows_per_step=round(decode["decode_rows"] / steps, 2),
        tokens_per_s=round(served.tokens_per_s, 1),
        accuracy=round(served.accuracy, 4),
        problems=served.problems,
    )
