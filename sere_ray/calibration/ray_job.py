"""Calibration on Ray: shards of the text, one copy of the model per worker, partial sums.

Ray Data hands shards to a pool of actors, restarts an actor that dies and repeats the shard that it
had. A shard is a fixed number of windows whatever the number of workers, and its sums are a file.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PretrainedConfig

from sere_ray.artifact.gates import router_fingerprint
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.calibration.collect import collect, find_moe_layers
from sere_ray.calibration.data import make_batches
from sere_ray.calibration.loading import load_model, pick_device, pick_dtype
from sere_ray.calibration.plan import (
    CalibrationPlan,
    CalibrationSettings,
    only_writer,
    prepare,
    write_artifact,
)
from sere_ray.calibration.routed import one_of_stacked, stacked
from sere_ray.calibration.similarity import Sums
from sere_ray.calibration.work_folder import Partial, WorkFolder
from sere_ray.util.errors import SereError
from sere_ray.util.progress import progress
from sere_ray.util.ray_instance import start_ray

SHARD_TOKENS = 4096
"""About how many tokens a shard has: four of the chunks that ``cka`` counts by."""
STORE_BYTES = 256 * 2**20
"""Object store of a Ray instance of our own: it holds token ids and sums of a few shards."""
RETRIES = 2
"""How often a worker that died is started again, and its shard repeated."""


def calibrate_on_ray(
    settings: CalibrationSettings,
    *,
    out: Path,
    workers: int | None = None,
    work: Path | None = None,
    address: str | None = None,
    console: Console,
) -> SimilarityArtifact:
    """Measure how similar the experts of a model are, on the workers of a Ray cluster.

    Args:
        settings: what is calibrated on what.
        out: the artifact's path, on the machine that runs this function.
        workers: copies of the model, each on one GPU or one CPU core; default: as many as the
            cluster has of them.
        work: folder of partial sums; default ``OUT.work``. Removed when the artifact is written.
        address: of a running cluster, ``auto`` for the one of this machine; None: a Ray instance
            of its own.
        console: where progress goes.

    Returns:
        What has been written to ``out``.

    Raises:
        SereError: the model, the text, the metric or the output path cannot be used; the work
            folder is another job's; there is no such cluster; or a worker died more often than it
            is restarted.
    """
    if settings.metric == "cka-exact":
        raise SereError("metric = 'cka-exact': is for one process; use 'cka' with --ray")
    plan = prepare(settings, out)
    shards = cut(plan)
    with only_writer(out):
        folder = WorkFolder(work or out.with_name(f"{out.name}.work"), plan, shards)
        done = folder.done()
        left = {i: windows for i, windows in enumerate(shards) if i not in done}
        if done:
            console.print(f"resuming: {len(done)} of {len(shards)} shards are done")
        if left:
            with ray_for(address, workers):
                run_shards(plan, left, folder, workers, console)
        total = folder.merged()
        artifact = write_artifact(plan, out, total.sums, total.fingerprints)
        folder.remove()
    return artifact


def cut(plan: CalibrationPlan) -> list[list[list[int]]]:
    """The windows in shards of about ``SHARD_TOKENS`` tokens, in order."""
    size = -(-SHARD_TOKENS // plan.settings.length)
    return [plan.windows[start : start + size] for start in range(0, len(plan.windows), size)]


class ShardWorker:
    """One copy of the model; turns windows into partial sums. Runs in an actor."""

    def __init__(
        self,
        settings: CalibrationSettings,
        config: PretrainedConfig,
        revision: str | None,
        pad_id: int,
        on_gpu: bool,
    ) -> None:
        torch.set_num_threads(1)  # a worker has one core
        self.settings = settings
        self.pad_id = pad_id
        self.device = pick_device("cuda" if on_gpu else "cpu")
        self.model = load_model(
            settings.model,
            revision=revision,
            device=self.device,
            dtype=pick_dtype(settings.dtype, self.device, config),
        )
        self.layers = find_moe_layers(self.model)
        gates = {i: router_fingerprint(layer.gate_weight) for i, layer in self.layers.items()}
        self.fingerprints = json.dumps(gates)
        self.dtype = str(self.model.dtype).removeprefix("torch.")

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Sums ``gram [1, layers, E, E]`` and ``tokens [1, layers]`` of a batch of one shard.

        Further statistics are ``routed.NAME [1, layers, ...]``.
        """
        windows = [[int(token) for token in window] for window in rows["windows"][0]]
        sums = {
            index: self.settings.make_sums(len(layer.gate_weight), self.device)
            for index, layer in self.layers.items()
        }
        collect(
            self.model,
            self.layers,
            make_batches(windows, self.settings.batch_size, self.pad_id),
            sums,
        )
        return {
            "shard": rows["shard"],
            "gram": torch.stack([layer.gram.cpu() for layer in sums.values()])[None].numpy(),
            "tokens": np.array([[layer.tokens for layer in sums.values()]]),
            "fingerprints": np.array([self.fingerprints]),
            "dtype": np.array([self.dtype]),
        } | stacked([layer.routed for layer in sums.values()])


def run_shards(
    plan: CalibrationPlan,
    shards: dict[int, list[list[int]]],
    folder: WorkFolder,
    workers: int | None,
    console: Console,
) -> None:
    """Calibrate some shards and write each one's sums as it comes; Ray must run.

    Raises:
        SereError: a worker failed, or died more often than it is restarted.
    """
    import ray
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayError
    from ray.util.annotations import RayDeprecationWarning

    gpus = on_gpu(plan.settings.device, ray.cluster_resources())
    count = workers or max(1, int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1)))
    rows = [{"shard": number, "windows": windows} for number, windows in shards.items()]
    with warnings.catch_warnings():
        # the pinned Ray has no other way to bound restarts, and announces that this one will go
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            ShardWorker,
            fn_constructor_args=(plan.settings, plan.config, plan.revision, plan.pad_id, gpus),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(count, len(rows))),
            num_gpus=1 if gpus else None,
            num_cpus=None if gpus else 1,
            ray_remote_args_fn=lambda: {"max_restarts": RETRIES, "max_task_retries": RETRIES},
        )
    tokens = sum(len(window) for windows in shards.values() for window in windows)
    try:
        with progress(console, tokens, task="calibrate", unit="tokens") as advance:
            for row in results.iter_batches(batch_size=1, prefetch_batches=0):
                number = int(row["shard"][0])
                folder.save(number, _partial(plan, row))
                advance(sum(map(len, shards[number])))
    except RayError as error:
        raise SereError(_reason(error, folder)) from None


def _partial(plan: CalibrationPlan, row: dict[str, Any]) -> Partial:
    """What a worker returned, as sums again."""
    sums: dict[int, Sums] = {}
    for position, index in enumerate(plan.shape.layers):
        sums[index] = plan.settings.make_sums(plan.shape.num_experts)
        sums[index].gram = torch.tensor(row["gram"][0][position])
        sums[index].tokens = int(row["tokens"][0][position])
        if (routed := sums[index].routed) is not None:
            routed.sums = one_of_stacked(row, position)
    gates = json.loads(row["fingerprints"][0])
    return Partial(sums, {int(i): gate for i, gate in gates.items()}, str(row["dtype"][0]))


def _reason(error: BaseException, folder: WorkFolder) -> str:
    """One message for what ended a worker, and how to go on."""
    from ray.exceptions import ActorDiedError

    causes = [error]
    while (cause := causes[-1].__cause__ or getattr(causes[-1], "cause", None)) is not None:
        causes.append(cause)
    own = next((cause for cause in causes if isinstance(cause, SereError)), None)
    if own is not None:
        return str(own)
    text = _last_words(error, causes[-1])
    remedy = "give fewer --workers or a smaller --batch-size"
    if isinstance(causes[-1], ActorDiedError):  # Ray cannot tell why: its text names all reasons
        what = f"a worker died {RETRIES + 1} times; if memory ran out, {remedy}"
    elif "memory" in text.lower():
        what = f"a worker ran out of memory; {remedy}"
    else:
        what = "a worker failed"
    return (
        f"{what}. {len(folder.done())} shards are kept in {folder.path}: the same command goes on "
        f"from there ({text[:300]})"
    )


def _last_words(error: BaseException, cause: BaseException) -> str:
    """Name and text of what ended a worker. Ray has an exception of user code only as text."""
    from ray.exceptions import UserCodeException

    if isinstance(cause, UserCodeException):
        traceback, _, _ = str(error).partition("\n\nThe above exception was the direct cause")
        return traceback.strip().splitlines()[-1]
    return " ".join(f"{type(cause).__name__}: {cause}".split())


def on_gpu(device: str, resources: dict[str, float]) -> bool:
    """Whether workers get a GPU each.

    Raises:
        SereError: they should, and the cluster has none.
    """
    has_gpu = resources.get("GPU", 0) >= 1
    if device == "auto":
        return has_gpu
    if device.startswith("cuda") and not has_gpu:
        raise SereError(f"device = {device!r}: the Ray cluster has no GPU; use cpu or auto")
    return device.startswith("cuda")


@contextmanager
def ray_for(address: str | None, workers: int | None) -> Iterator[None]:
    """Connect to Ray while the block runs, unless this process already is.

    Args:
        address: of a running cluster, ``auto`` for the one of this machine; None starts an instance
            of our own.
        workers: that will run; an instance of our own has a CPU for each.

    Raises:
        SereError: there is no such cluster.
    """
    import ray
    from ray.data import DataContext

    ours = not ray.is_initialized()
    logging.disable(logging.ERROR)  # Ray Data tells every step; we say ourselves what ended it
    try:
        if ours and address is None:
            cores = len(os.sched_getaffinity(0))
            start_ray(num_cpus=max(cores, workers or 1), object_store_memory=STORE_BYTES)
        elif ours:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.max_consecutive_actor_init_deaths = RETRIES
        yield
    except ConnectionError as error:
        raise SereError(f"--ray-address = {address!r}: no Ray cluster there ({error})") from None
    finally:
        if ours:
            ray.shutdown()
        logging.disable(logging.NOTSET)
