"""A loaded model, its artifact and held-out windows, on which settings are measured."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.calibration.collect import find_moe_layers, moe_shape
from sere_ray.calibration.data import make_windows, open_texts
from sere_ray.calibration.loading import (
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
)
from sere_ray.evaluation.comparison import Point
from sere_ray.evaluation.decode_batches import DecodeBatches, Measured
from sere_ray.evaluation.lda import Moments, Repair
from sere_ray.evaluation.settings import Setting, as_policy, label, rules_of, statistics_of
from sere_ray.evaluation.weight_statistics import ace_statistics
from sere_ray.masks.artifact import MasksArtifact
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
    """Windows; 0 = none, as for tasks, which cut the text themselves."""
    length: int
    prompt_tokens: int
    batches: tuple[int, ...]
    ranks: tuple[int, ...]
    device: str
    dtype: str = "auto"
    revision: str | None = None
    tune_data: str | None = None
    """A second text: peers are tuned and repairs fitted on it."""
    tune_sequences: int = 64
    tune_rules: tuple[str, ...] | None = None
    """Which are tuned; None = all that are measured."""

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
        if self.tune_data and self.tune_sequences % largest:
            raise SereError(
                f"--tune-sequences = {self.tune_sequences}: must be a multiple of the largest "
                f"batch ({largest})"
            )


class Evaluator:
    """A loaded model, its artifact and held-out windows.

    Args:
        plan: what to load.
        rules: names of the rules that will be measured; None = those that the artifact allows.

    Raises:
        SereError: the model, the artifact or the text cannot be used; says why.
    """

    def __init__(self, plan: EvaluationPlan, rules: tuple[str, ...] | None = ()) -> None:
        plan.check()
        self.plan = plan
        self.artifact = SimilarityArtifact.load(plan.similarity)
        self.rules = rules_of(self.artifact) if rules is None else rules
        for rule in self.rules:
            self.artifact.check_has(statistics_of(rule), path=str(plan.similarity), rule=rule)
        empty = torch.empty(0, plan.length, dtype=torch.long)
        windows = self.windows(plan.data) if plan.sequences else empty
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
        self.statistics: dict[int, dict[str, Tensor]] = {
            layer: dict(self.artifact.statistics.get(layer, {})) for layer in layers
        }
        if "ace" in self.rules:
            for layer, named in ace_statistics(self.model).items():
                self.statistics[layer] |= named
        self.masks: dict[str, MasksArtifact] = {}
        """Those that settings named so far, by path."""
        self._repairs: dict[tuple[str, int], Repair] = {}
        self._fitted_on: list[DecodeBatches] = []

    def windows(self, data: str, sequences: int | None = None) -> Tensor:
        """``[sequences, length]`` token ids; every window is whole.

        Args:
            data: the text.
            sequences: how many; None = as many as the plan says.

        Raises:
            DataError: the text is too short, or cannot be read.
        """
        plan, wanted = self.plan, sequences or self.plan.sequences
        tokenizer = load_tokenizer(plan.model, plan.revision)
        source = open_texts(data, plan.text_column)
        windows = make_windows(source.texts, tokenizer, wanted, plan.length)
        whole = sum(len(window) == plan.length for window in windows)
        if whole < wanted:
            raise DataError(
                f"data = {data!r}: gives {whole} whole windows of {plan.length} tokens, but "
                f"--sequences = {wanted}; give more text, or fewer or shorter sequences"
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
                    repair = self.repair(point.keys, point.batch)
                    found.append(chunk.measure(policy, point.batch, point.ranks or 1, repair))
                    advance(1)
        return [Measured.join(found) for found in parts]

    def texts_at_once(self, scored: int | None = None) -> int:
        """Texts of a forward pass: few on a CPU, many where launches cost more than arithmetic.

        Args:
            scored: positions of a text after its prompt; None = as the plan says.
        """
        if self.model.device.type == "cpu":
            return _AT_ONCE
        scored = scored or self.plan.length - self.plan.prompt_tokens
        vocabulary: int = self.model.config.get_text_config().vocab_size
        return _LOGITS_BYTES // (4 * scored * vocabulary)

    def bind(self, keys: dict[str, Any]) -> BoundPolicy:
        """A setting for this model.

        Raises:
            PolicyError: it does not fit.
        """
        policy = as_policy(keys)
        policy.check_layers(len(self.shape.layers))
        self._open_masks(policy)
        policy = policy.model_copy(update={"similarity": str(self.plan.similarity)})  # for messages
        strengths = self.artifact.metadata.strengths
        return policy.for_model(top_k=self.shape.top_k, strengths=strengths, where=label(keys))

    def _open_masks(self, policy: Setting) -> None:
        """Load and check the masks that a setting names.

        Raises:
            ArtifactError: they are not this model's, or have no such level.
        """
        path, level = policy.masks, policy.level
        if path is None or level is None:
            return
        if path not in self.masks:
            artifact = MasksArtifact.load(path)
            layers = find_moe_layers(self.model)
            gates = {index: layer.gate_weight for index, layer in layers.items()}
            artifact.check_model(gates, self.shape.top_k, path=path)
            self.masks[path] = artifact
        self.masks[path].level(level, path=path)

    def repair(self, keys: dict[str, Any], batch: int) -> Repair | None:
        """LDA's maps for a setting that asks for them, fitted on the second text; else None.

        Raises:
            SereError: there is no second text.
        """
        if not keys.get("lda"):
            return None
        if self.plan.tune_data is None:
            raise SereError(
                f"{label(keys)}: lda = True is fitted on a second text; give it with --tune-data"
            )
        name = (json.dumps(keys, sort_keys=True), batch)
        if name not in self._repairs:
            if not self._fitted_on:
                windows = self.windows(self.plan.tune_data, self.plan.tune_sequences)
                self._fitted_on = list(self.chunks(windows, max(self.plan.batches)))
            parts = [chunk.fit(self.bind(keys), batch) for chunk in self._fitted_on]
            merged = {layer: Moments.merge(part[layer] for part in parts) for layer in parts[0]}
            self._repairs[name] = {layer: sums.affine() for layer, sums in merged.items()}
        return self._repairs[name]

    def chunks(self, input_ids: Tensor, size: int) -> Iterator[DecodeBatches]:
        """The windows, ``size`` at a time, with their exact logits."""
        for start in range(0, len(input_ids), size):
            yield self.batches(input_ids[start : start + size], self.plan.prompt_tokens)

    def batches(self, input_ids: Tensor, prompt_tokens: int) -> DecodeBatches:
        """Texts ``[N, L]`` with their exact logits, on which settings are measured."""
        return DecodeBatches(
            self.model,
            input_ids,
            prompt_tokens,
            self.artifact.layers,
            self.plan.ranks,
            self.statistics,
            self.masks,
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
