"""How much the demo model's similarity depends on tokens, data and metric, and what that costs.

The similarity of every setting chooses stand-ins for the same random sets of kept experts, and
re-routes the same held-out text, teacher-forced, 16 rows a step.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sere_ray import assets
from sere_ray.bench.demo_model import LENGTH, PROMPT_TOKENS, bound
from sere_ray.bench.dispatch_traffic import interval
from sere_ray.calibration.collect import MoELayer, collect, find_moe_layers
from sere_ray.calibration.data import make_batches, make_windows
from sere_ray.calibration.loading import load_model, load_tokenizer
from sere_ray.calibration.similarity import make_sums
from sere_ray.evaluation.teacher_forced import Rerouter, divergence, exact_logits
from sere_ray.policy.policy import Policy
from sere_ray.util.files import atomic_path
from sere_ray.util.progress import progress

Similarity = Mapping[int, Tensor]
"""By MoE layer: ``[E, E]`` float32."""
TOKENS = (5_120, 20_480, 51_200, 204_800)
"""Multiples of the 1,024 tokens of a chunk of ``cka``."""
METRICS = {"frobenius": 204_800, "cosine": 204_800, "cka": 51_200}
"""Name -> most tokens: ``cka`` takes six times as long (docs/results/calibration-cpu.json)."""
DEFAULT = ("mixed", "frobenius")
"""Data and metric that all others are compared with: the shipped calibration text, all of it."""
BATCH = 16
TEXTS = 64
SELECT_TOP_K = (1, 2)
KEPT = 16
"""Experts of a random kept set: about what S = 2 keeps at this batch."""
KEPT_SETS = 1000


@dataclass(frozen=True)
class RobustnessPoint:
    """One setting and the similarity it gives."""

    data: str
    tokens: int
    metric: str
    similarity: Similarity


def run_robustness(save: Callable[[dict[str, Any]], None], *, work: Path, console: Console) -> None:
    """Calibrate every setting, compare all, and hand the content of the result to ``save``.

    Args:
        save: writes the result file.
        work: folder that keeps each data set's matrices: a command that was stopped goes on.
        console: where progress goes.
    """
    work.mkdir(exist_ok=True)
    model = load_model(
        str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32"
    )
    tokenizer = load_tokenizer(str(assets.MODEL))
    layers = find_moe_layers(model)
    points = [
        RobustnessPoint("none", 0, "random", random_similarity(layers)),
        RobustnessPoint("none", 0, "weights", weight_similarity(layers)),
    ]
    for name, texts in _data_sets().items():
        kept = work / f"{name}.safetensors"
        if not kept.exists():
            _keep(calibrate_nested(model, name, _windows(texts, tokenizer), console), kept)
        points += _kept(kept, name)
    default = max(
        (point for point in points if (point.data, point.metric) == DEFAULT),
        key=lambda point: point.tokens,
    )
    judge = Judge(model, tokenizer)
    base = {size: judge.divergence(default.similarity, size) for size in SELECT_TOP_K}
    rows = []
    with progress(console, len(points), task="quality", unit="settings") as advance:
        for point in points:
            row: dict[str, Any] = {
                "data": point.data,
                "tokens": point.tokens,
                "metric": point.metric,
                "same_stand_in": round(same_stand_in(point.similarity, default.similarity), 4),
            }
            for size in SELECT_TOP_K:
                kl = judge.divergence(point.similarity, size)
                row |= {
                    f"kl_s{size}": round(float(kl.mean()), 5),
                    f"kl_s{size}_95": interval(kl, None),
                    f"kl_s{size}_to_default": round(float(kl.sum() / base[size].sum()), 4),
                    f"kl_s{size}_to_default_95": interval(kl, base[size]),
                }
            rows.append(row)
            advance(1)
    save(
        {
            "model": "demo",
            "default": f"{DEFAULT[1]}, {DEFAULT[0]}, {default.tokens} tokens",
            "batch": BATCH,
            "texts": TEXTS,
            "scored_positions": TEXTS * (LENGTH - PROMPT_TOKENS),
            "rows": rows,
        }
    )


def calibrate_nested(
    model: PreTrainedModel, name: str, windows: list[list[int]], console: Console
) -> list[RobustnessPoint]:
    """Similarity from the first tokens of a data set, for each number of them it has.

    Args:
        model: in float32.
        name: of the data set.
        windows: token ids, ``LENGTH`` each.
        console: where progress goes.
    """
    layers = find_moe_layers(model)
    sums = {
        metric: {i: make_sums(metric, len(layer.gate_weight)) for i, layer in layers.items()}
        for metric in METRICS
    }
    available = len(windows) * LENGTH // 1024 * 1024
    marks = sorted({min(tokens, available) for tokens in TOKENS})
    points, done = [], 0
    total = sum(min(marks[-1], most) for most in METRICS.values())
    with progress(console, total, task=name, unit="tokens x metrics") as advance:
        for mark in marks:
            batches = make_batches(windows[done // LENGTH : mark // LENGTH], batch_size=16)
            for metric, of_layers in sums.items():
                if mark > METRICS[metric]:
                    continue
                collect(model, layers, batches, of_layers, advance)
                found = {index: layer.similarity() for index, layer in of_layers.items()}
                points.append(RobustnessPoint(name, mark, metric, found))
            done = mark
    return points


def weight_similarity(layers: Mapping[int, MoELayer]) -> Similarity:
    """Similarity without data: (cos + 1) / 2 of two experts' weights, each as one vector."""
    found = {}
    for index, layer in layers.items():
        parts = [weight.detach().flatten(1) for weight in layer.experts.parameters()]
        unit = normalize(torch.cat(parts, dim=1).double(), dim=1)
        found[index] = ((unit @ unit.T + 1) / 2).clamp(0, 1).float().fill_diagonal_(1)
    return found


def random_similarity(layers: Mapping[int, MoELayer]) -> Similarity:
    """Any stand-in as good as any other: what a similarity has to beat."""
    generator = torch.Generator().manual_seed(0)
    sizes = {index: len(layer.gate_weight) for index, layer in layers.items()}
    return {i: torch.rand(e, e, generator=generator).fill_diagonal_(1) for i, e in sizes.items()}


def same_stand_in(one: Similarity, other: Similarity) -> float:
    """Share of dropped experts that get the same stand-in, over layers and random kept sets."""
    generator = torch.Generator().manual_seed(0)
    same = total = 0
    for index, matrix in one.items():
        for _ in range(KEPT_SETS):
            order = torch.randperm(len(matrix), generator=generator)
            kept, dropped = order[:KEPT], order[KEPT:]
            picks = [m[dropped][:, kept].argmax(dim=1) for m in (matrix, other[index])]
            same += int((picks[0] == picks[1]).sum())
            total += len(dropped)
    return same / total


def _keep(points: list[RobustnessPoint], path: Path) -> None:
    tensors = {
        f"{point.tokens} {point.metric} {index}": matrix
        for point in points
        for index, matrix in point.similarity.items()
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def _kept(path: Path, data: str) -> list[RobustnessPoint]:
    found: dict[tuple[int, str], dict[int, Tensor]] = {}
    for name, matrix in load_file(path).items():
        tokens, metric, index = name.split()
        found.setdefault((int(tokens), metric), {})[int(index)] = matrix
    return [RobustnessPoint(data, *setting, found[setting]) for setting in sorted(found)]


class Judge:
    """KL of re-routing on the same held-out text for every similarity."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model = model
        self._texts = torch.tensor(make_windows(assets.heldout_texts(), tokenizer, TEXTS, LENGTH))
        logits = exact_logits(model, self._texts, PROMPT_TOKENS)
        self._exact = logits.double().log_softmax(dim=-1)

    def divergence(self, similarity: Similarity, select_top_k: int) -> NDArray[np.float64]:
        """``[TEXTS]``: mean KL(exact || re-routed) of each text's positions, nats."""
        policy = bound(Policy.parse({"similarity": "-", "select_top_k": select_top_k}))
        rerouter = Rerouter(policy, similarity, PROMPT_TOKENS)
        of_positions = [
            divergence(self._exact[rows], logits)
            for rows, logits in rerouter.scored(self._model, self._texts, BATCH)
        ]
        found: NDArray[np.float64] = torch.cat(of_positions).mean(dim=1).numpy()
        return found


def _data_sets() -> dict[str, list[str]]:
    """The shipped calibration text, its arithmetic alone, and the running Python's own modules.

    Modules that the held-out text is from are left out of the last one.
    """
    shipped = assets.records("calibration.jsonl")
    heldout = {record["module"] for record in assets.records("heldout.jsonl")}
    library = Path(os.__file__).parent
    modules = [path for path in sorted(library.glob("*.py")) if path.name not in heldout]
    return {
        "mixed": [record["text"] for record in shipped],
        "arithmetic": [record["text"] for record in shipped if record["kind"] == "chat"],
        "source": [path.read_text(encoding="utf-8", errors="replace") for path in modules],
    }


def _windows(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Whole windows of all texts, first ones first, as many as the largest setting needs."""
    per_text = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    rounds = max(len(ids) for ids in per_text) // LENGTH
    found = [
        ids[start * LENGTH : (start + 1) * LENGTH]
        for start in range(rounds)
        for ids in per_text
        if len(ids) >= (start + 1) * LENGTH
    ]
    return found[: max(TOKENS) // LENGTH]
