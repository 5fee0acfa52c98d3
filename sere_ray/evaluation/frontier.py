"""``sere-ray evaluate``: every rule at every setting and batch size, on the same held-out rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from sere_ray.artifact import SimilarityArtifact
from sere_ray.calibration.collect import find_moe_layers, moe_shape
from sere_ray.calibration.data import make_windows, open_texts
from sere_ray.calibration.loading import load_model, load_tokenizer, model_name, pick_device
from sere_ray.errors import DataError, SereError
from sere_ray.evaluation.comparison import compare
from sere_ray.evaluation.decode_batches import DecodeBatches, Measured
from sere_ray.evaluation.settings import as_policy, grid, label
from sere_ray.evaluation.statistics import Doubles, draws, mean, summarise
from sere_ray.progress import progress

Point = tuple[int, int]
"""Index of the setting, batch size."""


@dataclass(frozen=True)
class Plan:
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

    def __init__(self, plan: Plan) -> None:
        plan.check()
        self.plan = plan
        self.artifact = SimilarityArtifact.load(plan.similarity)
        windows = self.windows(plan.data)
        self.model = load_model(
            plan.model,
            revision=plan.revision,
            device=pick_device(plan.device),
            dtype="float32" if plan.device == "cpu" else "auto",
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
                f"data = {data!r}: gives {whole} windows of {plan.length} tokens, but --sequences "
                f"= {plan.sequences}; give more text, or fewer or shorter sequences"
            )
        return torch.tensor(windows)

    def measure(
        self,
        settings: list[dict[str, Any]],
        batches: tuple[int, ...],
        console: Console | None,
        input_ids: Tensor | None = None,
    ) -> dict[Point, Measured]:
        """Every setting at every batch size; memory holds the logits of the largest batch only."""
        policies = [
            as_policy(keys).for_model(top_k=self.shape.top_k, where=label(keys))
            for keys in settings
        ]
        parts: dict[Point, list[Measured]] = {
            (i, batch): [] for i in range(len(settings)) for batch in batches
        }
        for chunk, advance in self._chunks(input_ids, max(batches), len(parts), console):
            for (i, batch), found in parts.items():
                found.append(chunk.measure(policies[i], batch))
                advance(1)
        return {point: Measured.join(found) for point, found in parts.items()}

    def _chunks(
        self, input_ids: Tensor | None, size: int, points: int, console: Console | None
    ) -> Iterator[tuple[DecodeBatches, Callable[[int], None]]]:
        texts = self.input_ids if input_ids is None else input_ids
        plan, total = self.plan, points * (len(texts) // size)
        with progress(console, total, task="evaluate", unit="passes") as advance:
            for start in range(0, len(texts), size):
                yield (
                    DecodeBatches(
                        self.model,
                        texts[start : start + size],
                        plan.prompt_tokens,
                        self.artifact.layers,
                        plan.ranks,
                    ),
                    advance,
                )


def check_artifact(artifact: SimilarityArtifact, model: PreTrainedModel, path: str) -> None:
    """The artifact is of this model: shape, layers, and the gates' own numbers.

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
    plan: Plan,
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
    if settings is None:
        sizes = {"num_experts": shape.num_experts, "top_k": shape.top_k}
        settings = [keys for rule in rules for keys in grid(rule, **sizes)]
    exact = {"rule": "topk", "select_top_k": shape.top_k}
    found = evaluator.measure([exact, *settings], plan.batches, console)
    named: list[dict[str, Any]] = [{"rule": "exact"}, *settings]
    shares = draws(plan.sequences)
    rows = [
        row
        for batch in plan.batches
        for i, keys in enumerate(named)
        for row in _rows(keys, batch, found[i, batch], plan.ranks, shares)
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
        "rows": rows,
        "comparison": compare(named, found, plan.batches, shares),
    }


def _rows(
    keys: dict[str, Any],
    batch: int,
    found: Measured,
    ranks: tuple[int, ...],
    shares: Doubles,
) -> list[dict[str, Any]]:
    quality = summarise(found, shares)
    return [
        {
            "rule": keys["rule"],
            "settings": {k: v for k, v in keys.items() if k != "rule" and v is not None},
            "batch": batch,
            "ranks": count,
            **quality,
            **mean(found.busiest[count], shares).fields("experts_read_max_rank", 3),
        }
        for count in ranks
    ]
