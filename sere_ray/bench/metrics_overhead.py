"""What reading the counters costs: an engine as a replica runs it, with and without readings."""

import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from sere_ray import assets
from sere_ray.calibration import calibrate
from sere_ray.engine.control import of_engine
from sere_ray.engine.worker_calls import WorkerCalls
from sere_ray.observe.export import EngineExporter, RaySink
from sere_ray.serve.config import ServeConfig
from sere_ray.util.progress import progress, waiting
from sere_ray.util.ray_instance import start_ray

STREAMS = 16
TOKENS = 400
DEFAULT_INTERVAL: float = ServeConfig.model_fields["metrics_interval_s"].default
INTERVALS: tuple[float | None, ...] = (None, DEFAULT_INTERVAL, 0.05)
"""Seconds between two readings: never, the default, and so often that the cost can be seen."""


@dataclass
class Arm:
    """One interval, and what was measured with it, in the order of the repeats."""

    interval_s: float | None
    step_ms: list[float] = field(default_factory=list)
    reads: int = 0
    read_ms: list[float] = field(default_factory=list)


def run_overhead(
    save: Callable[[dict[str, Any]], None], *, repeats: int, seconds: float, console: Console
) -> None:
    """Measure, and save after every repeat.

    Args:
        save: takes the content of the result file.
        repeats: of every interval, interleaved.
        seconds: of decoding in each repeat.
        console: where progress goes.
    """
    import ray

    start_ray()  # so that exporting is real, too
    try:
        asyncio.run(_measure(save, repeats, seconds, console))
    finally:
        ray.shutdown()


async def _measure(
    save: Callable[[dict[str, Any]], None], repeats: int, seconds: float, console: Console
) -> None:
    arms = [Arm(interval) for interval in INTERVALS]
    with tempfile.TemporaryDirectory(prefix="sere-overhead-") as folder:
        similarity = Path(folder) / "demo.safetensors"
        calibrate(
            str(assets.MODEL),
            data=str(assets.CALIBRATION),
            out=similarity,
            sequences=40,  # reading costs the same whatever the numbers are
            console=console,
        )
        with waiting(console, "starting the engine"):
            engine = _start(similarity)
        try:
            await _decode(engine, seconds=1.0)  # warm
            exporter = EngineExporter(RaySink(_LABELS))
            with progress(
                console, repeats * len(arms), task="metrics-overhead", unit="repeats"
            ) as advance:
                for repeat in range(repeats):
                    for arm in random.Random(repeat).sample(arms, len(arms)):
                        async with _reading(engine, exporter, arm):
                            arm.step_ms.append(await _decode(engine, seconds))
                        advance(1)
                    save(summary(arms, seconds))
        finally:
            engine.shutdown()


_LABELS = dict.fromkeys(("app", "gang", "rank", "ReplicaId", "model_name"), "overhead")


def _start(similarity: Path) -> Any:
    """An engine in a process of its own, as Ray's replicas have it."""
    from vllm import AsyncEngineArgs, AsyncLLMEngine

    return AsyncLLMEngine.from_engine_args(
        AsyncEngineArgs(
            model=str(assets.MODEL),
            max_model_len=512,
            max_num_seqs=STREAMS,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.05,
            kv_cache_memory_bytes=1 << 28,
            disable_log_stats=True,
            additional_config={"sere": {"similarity": str(similarity), "select_top_k": 2}},
        )
    )


async def _decode(engine: Any, seconds: float) -> float:
    """Keep the batch full; returns milliseconds for a token of each stream, prompts included."""
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        await asyncio.gather(*(_stream(engine, f"{start}-{rounds}-{i}") for i in range(STREAMS)))
        rounds += 1
    return (time.perf_counter() - start) / (rounds * TOKENS) * 1e3


async def _stream(engine: Any, name: str) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        max_tokens=TOKENS,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompt = {"prompt_token_ids": [random.Random(name).randrange(2, 100) for _ in range(4)]}
    async for _ in engine.generate(prompt, sampling, name):
        pass


@contextlib.asynccontextmanager
async def _reading(engine: Any, exporter: EngineExporter, arm: Arm) -> AsyncIterator[None]:
    """Read the counters and export them as a replica does, while the block runs."""
    calls: WorkerCalls[Awaitable[list[Any]]] = WorkerCalls(
        lambda name, arguments: engine.collective_rpc(name, args=arguments)
    )

    async def read() -> None:
        while arm.interval_s is not None:
            start = time.perf_counter()
            counters = of_engine(await calls.counters(reset=False))
            took = time.perf_counter() - start
            exporter.export_counters(counters, took)
            arm.reads += 1
            arm.read_ms.append(took * 1e3)
            await asyncio.sleep(arm.interval_s)

    task = asyncio.create_task(read())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def summary(arms: list[Arm], seconds: float) -> dict[str, Any]:
    """Rows, and what one reading costs, found where they are most frequent.

    Args:
        arms: the first one never reads.
        seconds: of decoding in each repeat.
    """
    never, often = arms[0], arms[-1]
    lost = [(b - a) / b for a, b in zip(never.step_ms, often.step_ms, strict=True)]
    reads_per_second = often.reads / (len(often.step_ms) * seconds)
    costs = [share / reads_per_second for share in lost]
    return {
        "model": "demo",
        "streams": STREAMS,
        "seconds_per_repeat": seconds,
        "rows": [_row(arm, never) for arm in arms],
        "cost_of_a_reading_ms": {k: v * 1e3 for k, v in _spread(costs).items()},
        "default_interval_s": DEFAULT_INTERVAL,
        "share_of_a_step_at_the_default": {
            k: v / DEFAULT_INTERVAL for k, v in _spread(costs).items()
        },
    }


def _row(arm: Arm, never: Arm) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(arm.step_ms, never.step_ms, strict=True)]
    return {
        "interval_s": arm.interval_s,
        "repeats": len(arm.step_ms),
        "readings": arm.reads,
        "step_ms": _spread(arm.step_ms),
        "ratio_to_never": _spread(ratios),
        "asked_to_answered_ms": _spread(arm.read_ms) if arm.read_ms else None,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
