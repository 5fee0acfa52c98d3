"""What re-routing saves on the wire: the demo model's own routing, through real gloo ranks.

Held-out texts advance together, teacher-forced, as the rows of R data-parallel ranks would: one
union over all of them, experts placed linearly. What every layer gets is recorded, and R processes
replay it: dispatch, the experts of each, combine. The sums are compared with the model's own.
"""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sere_ray import assets
from sere_ray.bench.demo_model import PROMPT_TOKENS, heldout_windows
from sere_ray.calibration.collect import find_moe_layers
from sere_ray.calibration.loading import load_model
from sere_ray.dispatch import DISPATCH_COUNTS, AllToAll, mean_report
from sere_ray.evaluation.layer_rule import linear_owner
from sere_ray.evaluation.teacher_forced import LayerRows, Rerouter, divergence, exact_logits
from sere_ray.policy.bound import BoundPolicy

DTYPE = torch.bfloat16
"""The dtype of rows that are sent: the checkpoint's."""
_TIMEOUT = timedelta(seconds=120)
_RESAMPLES = 2000


@dataclass(frozen=True)
class Setting:
    """A policy on a number of ranks."""

    ranks: int
    policy: BoundPolicy


def measure_dispatch(
    settings: list[Setting],
    similarity: Mapping[int, Tensor],
    rows_per_rank: int,
    on_point: Callable[[], object],
) -> list[dict[str, Any]]:
    """A row of the result for each setting; the first of each number of ranks is compared with.

    Args:
        settings: grouped by ``ranks``; the first of a group re-routes nothing.
        similarity: decoder layer index -> ``float32 [E, E]``.
        rows_per_rank: decode rows of every rank.
        on_point: called after each setting.

    Raises:
        RuntimeError: a rank failed, or its sums are not the model's.
    """
    model = _load()
    windows = heldout_windows()
    exact = exact_logits(model, windows, PROMPT_TOKENS).double().log_softmax(dim=-1)
    rows: list[dict[str, Any]] = []
    for ranks in dict.fromkeys(setting.ranks for setting in settings):
        group = [setting for setting in settings if setting.ranks == ranks]
        with tempfile.TemporaryDirectory(prefix="sere-dispatch-") as folder:
            found = []
            for number, setting in enumerate(group):
                path = Path(folder) / f"{number}.safetensors"
                batch = ranks * rows_per_rank
                logits = _record(model, windows, setting, similarity, batch, path)
                found.append(divergence(exact[: len(logits)], logits))
                on_point()
            counts, errors = _replay(Path(folder), ranks, len(group))
        stock = _sent_per_step(counts[0])
        for setting, kl, of_setting, error in zip(group, found, counts, errors, strict=True):
            rows.append(
                _row(setting, rows_per_rank, of_setting, stock)
                | {"kl_mean": round(float(kl.mean()), 5)}
                | {"kl_mean_95": interval(kl.mean(dim=1).numpy(), None)}
                | {"largest_error": error}
            )
    return rows


# --- record: one process, all rows ---------------------------------------------------------------


def _load() -> PreTrainedModel:
    return load_model(str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32")


def _record(
    model: PreTrainedModel,
    windows: Tensor,
    setting: Setting,
    similarity: Mapping[int, Tensor],
    batch: int,
    path: Path,
) -> Tensor:
    """Write every layer's rows, ``[D, batch, n]``; returns logits of the decode steps."""
    found: dict[int, list[LayerRows]] = {layer: [] for layer in similarity}
    rerouter = Rerouter(
        setting.policy,
        similarity,
        PROMPT_TOKENS,
        on_layer=lambda layer, rows: found[layer].append(rows),
    )
    whole = windows[: len(windows) // batch * batch]
    logits = [logits for _, logits in rerouter.scored(model, whole, batch)]
    save_file(
        {
            f"{layer}.{name}": torch.cat([getattr(rows, name) for rows in parts])
            for layer, parts in found.items()
            for name in LayerRows._fields
        },
        path,
    )
    return torch.cat(logits)


# --- replay: a process for each rank -------------------------------------------------------------


def _replay(folder: Path, ranks: int, settings: int) -> tuple[list[NDArray[np.int64]], list[float]]:
    """Per setting ``[ranks, D, layers, counts]``, and the largest error of each."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    processes = [
        context.Process(target=_run_rank, args=(rank, ranks, folder, settings, answers))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        found: dict[int, list[tuple[NDArray[np.int64], float]]] = {}
        while len(found) < ranks:
            rank, value, error = answers.get(timeout=_TIMEOUT.total_seconds() * 5)
            if error is not None:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
            found[rank] = value
    finally:
        for process in processes:
            process.kill()
            process.join()
    per_setting = [[found[rank][number] for rank in range(ranks)] for number in range(settings)]
    return (
        [np.stack([counts for counts, _ in of_ranks]) for of_ranks in per_setting],
        [round(max(error for _, error in of_ranks), 5) for of_ranks in per_setting],
    )


def _run_rank(rank: int, ranks: int, folder: Path, settings: int, answers: Any) -> None:
    try:
        torch.set_num_threads(1)
        store = f"file://{folder}/rendezvous"
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=ranks, timeout=_TIMEOUT
        )
        model, group = _load(), dist.group.WORLD
        assert group is not None
        found = [
            _replay_setting(model, load_file(folder / f"{number}.safetensors"), group)
            for number in range(settings)
        ]
        answers.put((rank, found, None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))


def _replay_setting(
    model: PreTrainedModel, recorded: dict[str, Tensor], group: dist.ProcessGroup
) -> tuple[NDArray[np.int64], float]:
    """``[D, layers, counts]`` of this rank, and its largest error relative to the largest sum."""
    rank, ranks = group.rank(), group.size()
    moe_layers, counts, errors, largest = find_moe_layers(model), [], [0.0], [0.0]
    for layer, module in moe_layers.items():
        of_layer = []
        num_experts = module.gate_weight.shape[0]
        exchange = AllToAll(linear_owner(num_experts, ranks), group)
        for hidden, gate_ids, ids, weights in _steps(recorded, layer, rank, ranks):
            arrived, sent = exchange.dispatch(hidden, ids, weights, gate_ids)
            with torch.inference_mode():
                # The model's own module skips the id that is no expert's.
                here = arrived.topk_ids.masked_fill(arrived.topk_ids < 0, num_experts).long()
                partial = module.experts(arrived.hidden_states.float(), here, arrived.topk_weights)
                expected = module.experts(hidden.float(), ids, weights)
            combined = exchange.combine(partial.to(DTYPE), sent).float()
            errors.append(float((combined - expected).abs().max()))
            largest.append(float(expected.abs().max()))
            of_layer.append(sent.counts.numpy())
        counts.append(np.stack(of_layer))
    error = max(errors) / max(largest)
    if error > 2 * torch.finfo(DTYPE).eps * ranks:
        raise RuntimeError(f"sums differ from the model's by {error:.3f} of the largest")
    return np.stack(counts, axis=1), error


def _steps(
    recorded: dict[str, Tensor], layer: int, rank: int, ranks: int
) -> Iterator[tuple[Tensor, ...]]:
    """This rank's rows of every decode step: hidden states, gate's ids, ids, weights."""
    fields = [recorded[f"{layer}.{name}"] for name in LayerRows._fields]
    count = fields[0].shape[1] // ranks
    mine = slice(rank * count, (rank + 1) * count)
    for hidden, *others in zip(*fields, strict=True):
        yield hidden[mine].to(DTYPE), *(other[mine] for other in others)


# --- numbers -------------------------------------------------------------------------------------


def _sent_per_step(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows that leave their rank, ``[D]``."""
    sent: NDArray[np.int64] = counts[..., DISPATCH_COUNTS.index("rows_sent_after")].sum(axis=(0, 2))
    return sent


def _row(
    setting: Setting, rows_per_rank: int, counts: NDArray[np.int64], stock: NDArray[np.int64]
) -> dict[str, Any]:
    """Means per layer and step over the whole group."""
    ranks, steps, layers, _ = counts.shape
    sums = counts.sum(axis=(0, 1, 2))
    for i, name in enumerate(DISPATCH_COUNTS):
        if name.startswith("experts_read"):  # the same on every rank
            sums[i] = counts[0, ..., i].sum()
    calls = steps * layers
    config = assets.model_config()
    hidden_size, top_k = config["hidden_size"], config["num_experts_per_tok"]
    row_bytes = AllToAll.row_bytes(hidden_size, top_k, DTYPE)
    report = mean_report(sums.tolist(), calls=calls, ranks=ranks, row_bytes=row_bytes)
    sent = _sent_per_step(counts)
    return {
        "select_top_k": setting.policy.select_top_k,
        "ranks": ranks,
        "rows_per_rank": rows_per_rank,
        "bytes_dispatched": round(report["bytes_dispatched_after"] / calls, 1),
        "bytes_combined": round(report["bytes_combined_after"] / calls, 1),
        "rows_sent": round(report["rows_sent_after"] / calls, 3),
        "destination_ranks_mean": round(report["destination_ranks_mean_after"], 4),
        "experts_read_mean": round(report["experts_read_mean_after"], 3),
        "experts_read_max_rank": round(report["experts_read_max_rank_after"], 3),
        "bytes_to_top_k": round(float(sent.sum() / stock.sum()), 4),
        "bytes_to_top_k_95": interval(sent, stock),
        "bytes_to_gate": round(report["rows_sent_after"] / report["rows_sent_before"], 4),
        "bytes_to_all_gather": round(report["rows_sent_after"] / (report["rows"] * (ranks - 1)), 4),
    }


def interval(values: NDArray[Any], of: NDArray[Any] | None) -> list[float]:
    """95 % bootstrap interval of the mean, or of the ratio of sums to ``of``, over entries."""
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(values), (_RESAMPLES, len(values)))
    below = np.ones_like(values) if of is None else of
    ratios = values[picks].sum(axis=1) / below[picks].sum(axis=1)
    return [round(float(edge), 5) for edge in np.percentile(ratios, [2.5, 97.5])]
