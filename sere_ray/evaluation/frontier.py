"""``sere-ray evaluate``: every rule at every setting and batch size, on the same held-out rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.calibration.collect import MoEShape, find_moe_layers, moe_shape
from sere_ray.calibration.data import make_windows, open_texts
from sere_ray.calibration.loading import (
    load_config,
    load_model,
    load_tokenizer,
    model_name,
    pick_device,
    pick_dtype,
)
from sere_ray.evaluation.comparison import Point, compare
from sere_ray.evaluation.decode_batches import DecodeBatches, Measured
from sere_ray.evaluation.settings import EXACT, as_policy, grid, label, looks_at_ranks, rank_grid
from sere_ray.evaluation.statistics import Doubles, draws, mean, summarise
from sere_ray.policy.bound import BoundPolicy
from sere_ray.util.errors import DataError, SereError
from sere_ray.util.progress import progress

_AT_ONCE = 64
"""Texts of a forward pass on a CPU."""
_LOGITS_BYTES = 2 * 2**30
"""Size of the logits of a forward pass on a GPU. Some five tensors of this size are held."""


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated, and on what."""

    model: str
    similarity: Path
    data: str
    text_column: str
    sequences: int
    length: int
    prompt_tokens: int
    batches: tuple[int, ...]
    ranks: tuple[int, ...]
    device: str
    dtype: str = "auto"
    revision: str | None = None

    def check(self) -> None:
        """Refuse numbers that do not go together, before anything is loaded.

        Raises:
            SereError: names them.
        """
        if not 0 < self.prompt_tokens < self.length - 1:
            raise SereError(
                f"--prompt = {self.prompt_tokens}: must be 1..{self.length - 2} for windows of "
                f"--length = {self.length} tokens"
            )
        largest = max(self.batches)
        if self.sequences % largest or any(largest % batch for batch in self.batches):
            raise SereError(
                f"--sequences = {self.sequences}: must be a multiple of the largest batch "
                f"({largest}), and that one of every batch ({', '.join(map(str, self.batches))})"
            )


class Evaluator:
    """A loaded model, its artifact and held-out windows.

    Args:
        plan: what to load.

    Raises:
        SereError: the model, the artifact or the text cannot be used; says why.
    """

    def __init__(self, plan: EvaluationPlan) -> None:
        plan.check()
        self.plan = plan
        self.artifact = SimilarityArtifact.load(plan.similarity)
        windows = self.windows(plan.data)
        device = pick_device(plan.device)
        self.model = load_model(
            plan.model,
            revision=plan.revision,
            device=device,
            dtype=pick_dtype(plan.dtype, device, load_config(plan.model, plan.revision)),
        )
        layers = find_moe_layers(self.model)
        self.shape = moe_shape(self.model, layers)
        check_artifact(self.artifact, self.model, str(plan.similarity))
        self.input_ids = windows

    def windows(self, data: str) -> Tensor:
        """``[sequences, length]`` token ids; every window is whole.

        Raises:
            DataError: the text is too short, or cannot be read.
        """
        plan = self.plan
        tokenizer = load_tokenizer(plan.model, plan.revision)
        source = open_texts(data, plan.text_column)
        windows = make_windows(source.texts, tokenizer, plan.sequences, plan.length)
        whole = sum(len(window) == plan.length for window in windows)
        if whole < plan.sequences:
            raise DataError(
                f"data = {data!r}: gives {whole} whole windows of {plan.length} tokens, but "
                f"--sequences = {plan.sequences}; give more text, or fewer or shorter sequences"
            )
        return torch.tensor(windows)

    def measure(self, points: list[Point], console: Console | None) -> list[Measured]:
        """Measure settings, each at its batch size. Memory holds the logits of a part of the texts.

        Args:
            points: what to measure.
            console: where progress goes; None = nowhere.

        Returns:
            What each point gave, in their order.

        Raises:
            SereError: a setting does not fit the model.
        """
        policies = [self.bind(point.keys) for point in points]
        parts: list[list[Measured]] = [[] for _ in points]
        largest = max(point.batch for point in points)
        size = largest * max(1, self.texts_at_once() // largest)
        total = len(points) * -(-len(self.input_ids) // size)
        with progress(console, total, task="evaluate", unit="passes") as advance:
            for chunk in self.chunks(self.input_ids, size):
                for point, policy, found in zip(points, policies, parts, strict=True):
                    found.append(chunk.measure(policy, point.batch, point.ranks or 1))
                    advance(1)
        return [Measured.join(found) for found in parts]

    def texts_at_once(self) -> int:
        """Texts of a forward pass: few on a CPU, many where launches cost more than arithmetic."""
        if self.model.device.type == "cpu":
            return _AT_ONCE
        scored = self.plan.length - self.plan.prompt_tokens
        vocabulary: int = self.model.config.get_text_config().vocab_size
        return _LOGITS_BYTES // (4 * scored * vocabulary)

    def bind(self, keys: dict[str, Any]) -> BoundPolicy:
        """A setting for this model.

        Raises:
            PolicyError: it does not fit.
        """
        policy = as_policy(keys)
        policy.check_layers(len(self.shape.layers))
        return policy.for_model(top_k=self.shape.top_k, where=label(keys))

    def chunks(self, input_ids: Tensor, size: int) -> Iterator[DecodeBatches]:
        """The windows, ``size`` at a time, with their exact logits."""
        for start in range(0, len(input_ids), size):
            yield DecodeBatches(
                self.model,
                input_ids[start : start + size],
                self.plan.prompt_tokens,
                self.artifact.layers,
                self.plan.ranks,
            )


def check_artifact(artifact: SimilarityArtifact, model: PreTrainedModel, path: str) -> None:
    """Refuse an artifact of another model: its shape, layers or gates differ.

    Raises:
        ArtifactError: says what differs.
    """
    layers = find_moe_layers(model)
    shape = moe_shape(model, layers)
    artifact.check_model(
        architecture=shape.architecture,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        path=path,
    )
    for index, layer in layers.items():
        artifact.matrix(index, path=path)
        artifact.check_router(index, layer.gate_weight, path=path)


def evaluate(
    plan: EvaluationPlan,
    *,
    rules: tuple[str, ...],
    settings: list[dict[str, Any]] | None,
    console: Console | None,
) -> dict[str, Any]:
    """The content of a result file: ``rows`` and ``comparison``.

    Args:
        plan: what to load.
        rules: names; used where ``settings`` is None.
        settings: policies without ``similarity``; None = a grid for every rule.
        console: where progress goes.

    Raises:
        SereError: something cannot be used; says why.
    """
    evaluator = Evaluator(plan)
    shape = evaluator.shape
    points = _points(plan, shape, rules, settings)
    found = evaluator.measure(points, console)
    shares = draws(plan.sequences)
    rows = [
        row
        for point, measured in zip(points, found, strict=True)
        for row in _rows(point, measured, plan.ranks, shares)
    ]
    return {
        "model": model_name(plan.model),
        "data": Path(plan.data).name,
        "similarity": f"{evaluator.artifact.metadata.metric}, of "
        f"{evaluator.artifact.metadata.tokens} tokens",
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "sequences": plan.sequences,
        "scored_positions": plan.sequences * (plan.length - plan.prompt_tokens),
        "dtype": str(evaluator.model.dtype).removeprefix("torch."),
        "rows": rows,
        "comparison": compare(points, found, shares, plan.ranks),
    }


def _points(
    plan: EvaluationPlan,
    shape: MoEShape,
    rules: tuple[str, ...],
    settings: list[dict[str, Any]] | None,
) -> list[Point]:
    """Every setting to measure; a setting that depends on ranks, with each number of ranks."""
    exact = {"rule": "topk", "select_top_k": shape.top_k}
    points = [Point(EXACT, exact, batch) for batch in plan.batches]
    for batch in plan.batches:
        sizes = {"batch": batch, "num_experts": shape.num_experts, "top_k": shape.top_k}
        for keys in settings or [keys for rule in rules for keys in grid(rule, **sizes)]:
            counts = plan.ranks if looks_at_ranks(keys) else (None,)
            points += [Point(keys["rule"], keys, batch, count) for count in counts]
        if not settings:
            points += [
                Point(rule, keys, batch, count)
                for count in plan.ranks
                for rule in rules
                for keys in rank_grid(rule, count, **sizes)
            ]
    return points


def check_same_text(old: dict[str, Any], new: dict[str, Any], batches: tuple[int, ...]) -> None:
    """Refuse to add to a result of another model or text, or one that has these batch sizes.

    Raises:
        SereError: names what differs.
    """
    for name in ("model", "data", "similarity", "sequences", "scored_positions"):
        if old.get(name) != new[name]:
            raise SereError(
                f"--append: the file's {name} is {old.get(name)!r}, this run's is {new[name]!r}; "
                "write another file"
            )
    known = {row["batch"] for row in old["rows"]}.intersection(batches)
    if known:
        raise SereError(f"--append: the file has batch sizes {sorted(known)} already")


def _rows(
    point: Point, found: Measured, ranks: tuple[int, ...], shares: Doubles
) -> list[dict[str, Any]]:
    quality = summarise(found, shares)
    knobs = {} if point.rule == EXACT else point.keys
    return [
        {
            "rule": point.rule,
            "settings": {k: v for k, v in knobs.items() if k != "rule" and v is not None},
            "batch": point.batch,
            "ranks": count,
            **quality,
            **mean(found.busiest[count], shares).fields("experts_read_max_rank", 3),
        }
        for count in ranks
        if point.ranks in (None, count)
    ]
