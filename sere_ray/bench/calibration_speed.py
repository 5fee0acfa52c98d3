"""How fast calibration is: token rates against a forward pass that keeps nothing; workers.

The baseline runs the model with every expert on every token and throws the outputs away.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sere_ray import assets
from sere_ray.bench.models import get_model
from sere_ray.calibration.collect import MoELayer, collect, find_moe_layers
from sere_ray.calibration.data import Batch, make_batches
from sere_ray.calibration.loading import load_model
from sere_ray.calibration.plan import CalibrationSettings, prepare
from sere_ray.calibration.ray_job import cut, ray_for, run_shards
from sere_ray.calibration.similarity import Sums, make_sums
from sere_ray.calibration.work_folder import WorkFolder
from sere_ray.util.errors import SereError
from sere_ray.util.progress import progress

Rows = list[dict[str, Any]]

LENGTH = 128
BATCH_SIZE = 16
BASELINE = "forward"
ARMS = (BASELINE, "frobenius", "cosine", "cka")
WORKERS = (1, 2)
WORKER_SHARDS = 16
"""Shards of a job with Ray workers, 4,096 tokens each."""


class NoSums(Sums):
    """Keeps nothing: the baseline."""

    def update(self, outputs: Tensor) -> None:
        """Nothing."""

    def _matrix(self) -> Tensor:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Timing:
    """One pass over the tokens."""

    seconds: float
    peak_mib: float | None
    """GPU memory beside the model; None on a CPU."""


def run_calibration_bench(
    save: Callable[[dict[str, Any]], None],
    *,
    model: str,
    tokens: int,
    repeats: int,
    console: Console,
) -> None:
    """Measure rates and, on a CPU, workers; ``save`` gets the content after each repeat.

    Args:
        save: writes the result file.
        model: ``demo`` or a public shape of :func:`~sere_ray.bench.models.get_model`.
        tokens: of a pass, a multiple of 2,048.
        repeats: passes of every arm.
        console: where progress goes.

    Raises:
        SereError: a model that is too large for this machine's CPU.
    """
    on_gpu = torch.cuda.is_available()
    if model != "demo" and not on_gpu:
        raise SereError(f"--model = {model!r}: is for a host with a GPU; use demo here")
    content: dict[str, Any] = {
        "model": get_model(model).name,
        "length": LENGTH,
        "batch_size": BATCH_SIZE,
        "threads": None if on_gpu else 1,
    }
    of_repeats = rates(model, tokens=tokens, repeats=repeats, console=console)
    for done, rows in enumerate(of_repeats, start=1):
        content |= {"repeats": done, "rows": rows}
        save(content)
    if not on_gpu:
        save({**content, "workers": worker_rates(repeats, console)})


def rates(name: str, *, tokens: int, repeats: int, console: Console) -> Iterator[Rows]:
    """Token rates of every metric and the baseline, interleaved in this process.

    Yields the rows of all repeats so far after each, so that a run that is cut off has some.

    Args:
        name: ``demo`` or a public shape of :func:`~sere_ray.bench.models.get_model`.
        tokens: of a pass, a multiple of 2,048.
        repeats: passes of every arm.
        console: where progress goes.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # what one worker has
    model = _model(name, device)
    layers = find_moe_layers(model)
    batches = _random_batches(tokens, model.config.get_text_config().vocab_size)
    timings: dict[str, list[Timing]] = {arm: [] for arm in ARMS}
    for arm in ARMS:
        _pass(arm, model, layers, batches[:1])  # first calls compile and allocate
    with progress(console, repeats * len(ARMS), task="rates", unit="passes") as advance:
        for _ in range(repeats):
            for arm in ARMS:
                timings[arm].append(_pass(arm, model, layers, batches))
                advance(1)
            yield [_row(arm, timings, tokens) for arm in ARMS]


def worker_rates(repeats: int, console: Console) -> Rows:
    """Token rates of the Ray job on the demo model with 1 and 2 workers of one core, interleaved.

    The time from the moment on at which every worker has finished a shard: a job's start is
    not counted.
    """
    settings = CalibrationSettings(
        str(assets.MODEL), str(assets.CALIBRATION), device="cpu", batch_size=BATCH_SIZE
    )
    plan = prepare(dataclasses.replace(settings, sequences=WORKER_SHARDS * 32), Path("unused"))
    found: dict[int, list[float]] = {count: [] for count in WORKERS}
    shards = cut(plan)
    with ray_for(None, max(WORKERS)):
        for _ in range(repeats):
            for count in WORKERS:
                with TemporaryDirectory() as work:
                    folder = WorkFolder(Path(work) / "work", plan, shards)
                    run_shards(plan, dict(enumerate(shards)), folder, count, console)
                    done = sorted(p.stat().st_mtime for p in folder.path.glob("shard-*"))
                tokens = (len(done) - count) * plan.tokens / len(done)
                found[count].append(tokens / (done[-1] - done[count - 1]))
    gains = [many / one for one, many in zip(found[1], found[2], strict=True)]
    return [
        {"workers": count, **_spread("tokens_per_s", found[count], 0)}
        | ({} if count == 1 else _spread("to_one_worker", gains, 3))
        for count in WORKERS
    ]


def _pass(
    arm: str, model: PreTrainedModel, layers: Mapping[int, MoELayer], batches: list[Batch]
) -> Timing:
    on_gpu = model.device.type == "cuda"
    sums = {index: _sums(arm, len(layer.gate_weight), model) for index, layer in layers.items()}
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    collect(model, layers, batches, sums)
    if not on_gpu:
        return Timing(time.perf_counter() - start, None)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return Timing(seconds, (torch.cuda.max_memory_allocated() - before) / 2**20)


def _sums(arm: str, num_experts: int, model: PreTrainedModel) -> Sums:
    if arm == BASELINE:
        return NoSums(num_experts, model.device)
    return make_sums(arm, num_experts, model.device)


def _row(arm: str, timings: dict[str, list[Timing]], tokens: int) -> dict[str, Any]:
    own = [timing.seconds for timing in timings[arm]]
    baseline = [timing.seconds for timing in timings[BASELINE]]
    peaks = [timing.peak_mib for timing in timings[arm] if timing.peak_mib is not None]
    return {
        "arm": arm,
        "tokens": tokens,
        **_spread("seconds", own, 2),
        **_spread("tokens_per_s", [tokens / seconds for seconds in own], 0),
        **_spread("to_forward", [b / o for b, o in zip(baseline, own, strict=True)], 3),
        "gpu_peak_beside_model_mib": round(max(peaks)) if peaks else None,
    }


def _spread(name: str, values: list[float], digits: int) -> dict[str, float]:
    return {
        name: round(median(values), digits),
        f"{name}_min": round(min(values), digits),
        f"{name}_max": round(max(values), digits),
    }


def _model(name: str, device: torch.device) -> PreTrainedModel:
    if name == "demo":
        dtype = "auto" if device.type == "cuda" else "float32"
        return load_model(str(assets.MODEL), revision=None, device=device, dtype=dtype)
    shape = dict(get_model(name).config)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def _random_batches(tokens: int, vocabulary: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (tokens // LENGTH, LENGTH), generator=generator)
    return make_batches(ids.tolist(), BATCH_SIZE)
