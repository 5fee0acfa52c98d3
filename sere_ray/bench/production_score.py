"""What production scores say, and what they cost: the demo model in an engine as a replica runs it.

What they say: answers are served 16 at a time, scored, and given to the evaluator, which computes
the same rows of the same texts by itself. What they cost: 16 streams with and without scores.
"""

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sere_ray import assets
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.bench.demo_model import bound
from sere_ray.bench.scored_clients import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    STREAMS,
    Clients,
    scored,
)
from sere_ray.calibration import calibrate
from sere_ray.calibration.loading import load_model
from sere_ray.evaluation.decode_batches import DecodeBatches
from sere_ray.observe.score import ScoreSums
from sere_ray.policy.policy import Policy
from sere_ray.serve.replica.scorer import ScoreConfig
from sere_ray.util.progress import progress, waiting

DEFAULT_SHARE: float = ScoreConfig.model_fields["share"].default
SHARES = (0.0, DEFAULT_SHARE, 10 * DEFAULT_SHARE, 1.0)
"""Of scored answers: none, the default, ten times it, and all."""
QUALITY: dict[str, dict[str, Any]] = {
    "exact": {"select_top_k": 2},
    "sere, S = 2": {"select_top_k": 2},
    "margin, tau = 0.01": {"rule": "margin", "tau": 0.01},
    "sere, S = 1": {"select_top_k": 1},
}
"""Policies by name; requests of the first are of the tier ``exact``."""


@dataclass
class Arm:
    """One share, and what was measured with it, in the order of the repeats."""

    share: float
    tokens_per_s: list[float] = field(default_factory=list)
    answers: int = 0
    scored: int = 0


def run_production_score(
    save: Callable[[dict[str, Any]], None],
    *,
    batches: int,
    repeats: int,
    answers: int,
    console: Console,
) -> None:
    """Measure, and save after every part and repeat.

    Args:
        save: takes the content of the result file.
        batches: of 16 answers, for each policy of the first part.
        repeats: of every share in the second part, interleaved.
        answers: of each stream in a repeat.
        console: where progress goes.
    """
    with tempfile.TemporaryDirectory(prefix="sere-score-") as folder:
        similarity = Path(folder) / "demo.safetensors"
        calibrate(str(assets.MODEL), data=str(assets.CALIBRATION), out=similarity, console=console)
        asyncio.run(_measure(similarity, save, batches, repeats, answers, console))


async def _measure(
    similarity: Path,
    save: Callable[[dict[str, Any]], None],
    batches: int,
    repeats: int,
    answers: int,
    console: Console,
) -> None:
    with waiting(console, "starting the engine"):
        clients = Clients(similarity)
    arms = [Arm(share) for share in SHARES]
    quality: list[dict[str, Any]] = []
    try:
        await clients.load(1)  # warm
        with progress(console, len(QUALITY), task="what they say", unit="policies") as advance:
            for name, keys in QUALITY.items():
                texts, sums = await clients.scored_texts(keys, batches, exact=name == "exact")
                by_evaluator = None if name == "exact" else evaluate(texts, keys, similarity)
                quality.append(quality_row(name, sums, by_evaluator))
                advance(1)
        save(summary(quality, arms, answers))
        await clients.set_policy(QUALITY["sere, S = 2"])
        with progress(console, repeats * len(arms), task="cost", unit="repeats") as advance:
            for repeat in range(repeats):
                for arm in random.Random(repeat).sample(arms, len(arms)):
                    await run(clients, arm, answers)
                    advance(1)
                save(summary(quality, arms, answers))
    finally:
        clients.engine.shutdown()


async def run(clients: Clients, arm: Arm, answers: int) -> None:
    """One repeat of an arm."""
    scorer = clients.scorer(arm.share) if arm.share else None
    start = time.perf_counter()
    tokens = await clients.load(answers)
    arm.tokens_per_s.append(tokens / (time.perf_counter() - start))
    arm.answers += STREAMS * answers
    if scorer is not None:
        arm.scored += scored(scorer)
        scorer.close()


def evaluate(texts: torch.Tensor, keys: dict[str, Any], similarity: Path) -> ScoreSums:
    """The evaluator's own sums over these texts: the same rows, teacher-forced, 16 a step."""
    model = load_model(
        str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype=torch.float32
    )
    layers = SimilarityArtifact.load(similarity).layers
    batches = DecodeBatches(model, texts, PROMPT_TOKENS, layers)
    policy = bound(Policy.parse({"similarity": str(similarity), **keys}))
    found, exact = batches.measure(policy, STREAMS), batches.predictions(None, STREAMS)
    sums = ScoreSums()
    for loss, log_p, agrees in zip(found.loss, exact.log_p, found.agreement, strict=True):
        sums.add_sums(float(loss.sum()), -float(log_p.sum()), int(agrees[:-1].sum()), len(loss))
    return sums


def quality_row(name: str, found: ScoreSums, evaluated: ScoreSums | None) -> dict[str, Any]:
    """A row: what was scored while serving, and what the evaluator says of the same texts."""
    row = {"policy": name, "answers": found.answers, "tokens": found.tokens, **_said(found)}
    if evaluated is None:
        return row
    return {**row, **{f"evaluator_{key}": value for key, value in _said(evaluated).items()}}


def _said(sums: ScoreSums) -> dict[str, float | None]:
    values = {
        "nats": sums.nats,
        "standard_error": sums.standard_error,
        "agreement": sums.agreement,
    }
    return {name: None if value is None else round(value, 6) for name, value in values.items()}


def summary(quality: list[dict[str, Any]], arms: list[Arm], answers: int) -> dict[str, Any]:
    """The content of the result file.

    Args:
        quality: rows of the first part.
        arms: of the second, one for each of ``SHARES``.
        answers: of each stream in a repeat.
    """
    none, _, tenfold, _ = arms
    # What is lost grows with the share while runs of sampled requests do not meet.
    at_default = [(1 - ratio) / 10 for ratio in _ratios(tenfold, none)]
    return {
        "model": "demo",
        "dtype": "float32",
        "streams": STREAMS,
        "prompt_tokens": PROMPT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "quality": quality,
        "answers_per_repeat": STREAMS * answers,
        "throughput": list(_throughput(arms)),
        "default_share": DEFAULT_SHARE,
        "lost_at_the_default": _spread(at_default) if at_default else None,
    }


def _throughput(arms: list[Arm]) -> Iterator[dict[str, Any]]:
    for arm in arms:
        if arm.tokens_per_s:
            yield {
                "share": arm.share,
                "repeats": len(arm.tokens_per_s),
                "answers": arm.answers,
                "scored": arm.scored,
                "tokens_per_s": _spread(arm.tokens_per_s),
                "ratio_to_none": _spread(_ratios(arm, arms[0])),
            }


def _ratios(arm: Arm, none: Arm) -> list[float]:
    return [a / b for a, b in zip(arm.tokens_per_s, none.tokens_per_s, strict=True)]


def _spread(values: list[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 6) for name, value in found.items()}
