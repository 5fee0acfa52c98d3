"""What Ray Serve adds to vLLM's own OpenAI server, as a client on the same machine sees it.

Arms take turns on the machine: a server is up alone, so that what an idle one polls for takes
nothing from the other. Random weights, the same policy and engine arguments in every arm.
"""

import asyncio
import itertools
import json
import random
import secrets
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request

import aiohttp
import psutil
from rich.console import Console

from sere_ray.bench.completions import complete
from sere_ray.bench.engines import gpu_engine, on_gpu, prompt_tokens, write_config
from sere_ray.bench.models import Model, get_model, write_tokenizer
from sere_ray.bench.processor_time import cores_used, processor_seconds
from sere_ray.bench.servers import served, server
from sere_ray.calibration.synthetic import synthetic_artifact
from sere_ray.serve.app import ENGINE_DEFAULTS, share_cores
from sere_ray.serve.gateway.keys import API_KEY
from sere_ray.serve.way import DEFAULT, DIRECT
from sere_ray.util.http import open_url
from sere_ray.util.ports import free_port
from sere_ray.util.progress import progress

BARE = "bare"
PROXIES = (DEFAULT, DIRECT)
"""Ways through Ray Serve: its proxy and ingress; HAProxy to the engine's own server."""
MODEL_ID = "bench"
MODEL_LENGTH = 1024
REQUEST_SECONDS = 300.0


@dataclass(frozen=True)
class Block:
    """Requests of one arm at one concurrency, in one go."""

    ttft_ms: float
    """Median."""
    tokens_per_s: float
    cores: dict[str, float]
    """Processor seconds a second, by kind of process."""


@dataclass(frozen=True)
class OverheadPlan:
    """What every arm serves.

    Attributes:
        model: shapes; weights are random.
        folder: its configuration and tokenizer.
        policy: value of the ``sere`` key; empty = none.
        engine: further vLLM arguments.
        tokens: output tokens of a request.
        model_id: name for clients.
    """

    model: Model
    folder: Path
    policy: dict[str, Any]
    engine: dict[str, Any]
    tokens: int
    model_id: str = MODEL_ID

    def body(self) -> dict[str, Any]:
        """A request: a random prompt, streamed."""
        vocabulary = int(self.model.config["vocab_size"])
        return {
            "model": self.model_id,
            "prompt": [random.randrange(2, vocabulary) for _ in range(prompt_tokens())],
            "max_tokens": self.tokens,
            "temperature": 1,  # or random weights soon say the same in every stream
            "ignore_eos": True,
            "stream": True,
        }


def run_serving_overhead(
    model: str,
    *,
    concurrencies: list[int],
    repeats: int,
    tokens: int,
    proxies: list[str],
    compiled: bool,
    save: Callable[[dict[str, Any]], None],
    console: Console | None,
) -> None:
    """Measure all arms, one after the other, ``repeats`` times.

    Args:
        model: a name of :func:`get_model`.
        concurrencies: requests in flight.
        repeats: starts of each server.
        tokens: output tokens of a request.
        proxies: keys of ``PROXIES``.
        compiled: run vLLM's compiled graphs; False = eager.
        save: called with ``{"rows": [...]}`` after each round of all arms.
        console: where progress goes.

    Raises:
        SereError: a server does not start.
    """
    blocks: dict[tuple[str, int], list[Block]] = defaultdict(list)
    arms = [BARE, *proxies]
    with tempfile.TemporaryDirectory(prefix="sere-overhead-") as name:
        plan = make_plan(get_model(model), Path(name), max(concurrencies), tokens, compiled)
        total = repeats * len(arms)
        with progress(console, total, task="overhead", unit="server starts") as advance:
            for repeat in range(repeats):
                for arm in arms[repeat % len(arms) :] + arms[: repeat % len(arms)]:
                    with start(plan, arm) as (url, key, root):
                        for concurrency in concurrencies:
                            block = asyncio.run(measure(plan, url, key, concurrency, root))
                            blocks[arm, concurrency].append(block)
                    advance(1)
                save({"model": plan.model.name, "rows": list(rows(blocks, proxies))})


def make_plan(
    model: Model, parent: Path, streams: int, tokens: int, compiled: bool
) -> OverheadPlan:
    """Write what the arms read."""
    folder, similarity = write_config(model, parent), parent / "sere.safetensors"
    write_tokenizer(folder, int(model.config["vocab_size"]))
    synthetic_artifact(folder).save(similarity)
    return OverheadPlan(
        model=model,
        folder=folder,
        policy={"similarity": str(similarity), "select_top_k": 2},
        engine={
            "load_format": "dummy",
            "max_model_len": MODEL_LENGTH,
            "max_num_seqs": streams,
            "enforce_eager": not compiled,
            **(gpu_engine(model, streams, MODEL_LENGTH) if on_gpu() else {}),
        },
        tokens=tokens,
    )


@contextmanager
def start(plan: OverheadPlan, arm: str) -> Iterator[tuple[str, str, psutil.Process]]:
    """The server of an arm: its URL, its key, and the process below which it runs."""
    port, key = free_port(), secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="sere-server-") as name:
        starting = (
            _bare(plan, Path(name), port, key)
            if arm == BARE
            else _ours(plan, Path(name), port, key, proxy=arm)
        )
        with starting as process:
            yield f"http://127.0.0.1:{port}", key, psutil.Process(process.pid)


def _ours(plan: OverheadPlan, folder: Path, port: int, key: str, proxy: str) -> Any:
    arguments = {
        "model": str(plan.folder),
        "model_id": plan.model_id,
        "device": "gpu" if on_gpu() else "cpu",
        "sere": plan.policy or None,
        "engine": plan.engine,
    }
    return served(folder, port, arguments, {API_KEY: key}, proxy=proxy)


def _bare(plan: OverheadPlan, folder: Path, port: int, key: str) -> Any:
    """vLLM's server with the same arguments, and what our deployments add on a CPU."""
    device = "gpu" if on_gpu() else "cpu"
    engine = {**ENGINE_DEFAULTS[device], **plan.engine}
    options = {
        "model": str(plan.folder),
        "served-model-name": plan.model_id,
        "host": "127.0.0.1",
        "port": port,
        "api-key": key,
        "additional-config": json.dumps({"sere": plan.policy} if plan.policy else {}),
        **{k.replace("_", "-"): v for k, v in engine.items() if not isinstance(v, bool)},
    }
    if "compilation-config" in options:
        options["compilation-config"] = json.dumps(options["compilation-config"])
    flags = [f"--{k.replace('_', '-')}" for k, v in engine.items() if v is True]
    command = ["-m", "vllm.entrypoints.openai.api_server", "--disable-uvicorn-access-log", *flags]
    for option, value in options.items():
        command += [f"--{option}", str(value)]
    environment = {} if on_gpu() else share_cores(1)

    def is_up() -> bool:
        return _answers(f"http://127.0.0.1:{port}/v1/models", key)

    return server(command, folder / "log", is_up, environment)


def _answers(url: str, key: str) -> bool:
    try:
        with open_url(Request(url, headers=_bearer(key)), 10):
            return True
    except (HTTPError, URLError, OSError):
        return False


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def measure(
    plan: OverheadPlan, url: str, key: str, concurrency: int, root: psutil.Process
) -> Block:
    """Warm up, then send requests with ``concurrency`` of them in flight."""
    limits = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=limits, connector=connector) as session:

        async def send(count: int) -> list[float]:
            waiting = iter(range(count))
            firsts: list[float] = []

            async def stream() -> None:
                for _ in waiting:
                    reply = await complete(session, url, plan.body(), _bearer(key))
                    assert reply.complete, reply
                    firsts.append(reply.first_token_s or reply.seconds)

            await asyncio.gather(*(stream() for _ in range(concurrency)))
            return firsts

        requests = max(3 * concurrency, 24)
        await send(requests)  # as many: an engine may stall at each batch size that is new to it
        before, start = processor_seconds(root), asyncio.get_running_loop().time()
        firsts = await send(requests)
        seconds = asyncio.get_running_loop().time() - start
        after = processor_seconds(root)
    return Block(
        ttft_ms=statistics.median(firsts) * 1e3,
        tokens_per_s=requests * plan.tokens / seconds,
        cores=cores_used(before, after, seconds),
    )


def rows(
    blocks: Mapping[tuple[str, int], list[Block]], proxies: list[str]
) -> Iterator[dict[str, Any]]:
    """One for each proxy and concurrency; medians over the repeats, with least and greatest."""
    concurrencies = sorted({concurrency for _, concurrency in blocks})
    for proxy, concurrency in itertools.product(proxies, concurrencies):
        ours, bare = blocks[proxy, concurrency], blocks[BARE, concurrency]
        ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, bare, strict=True)]
        yield {
            "proxy": proxy,
            "concurrency": concurrency,
            "repeats": len(ours),
            **_spread("ttft_ms", [block.ttft_ms for block in ours]),
            **_spread("bare_ttft_ms", [block.ttft_ms for block in bare]),
            **_spread("tokens_per_s", [block.tokens_per_s for block in ours]),
            **_spread("bare_tokens_per_s", [block.tokens_per_s for block in bare]),
            **_spread("tokens_per_s_ratio", ratios),
            "cores": _mean_cores(ours),
            "bare_cores": _mean_cores(bare),
        }


def _spread(name: str, values: list[float]) -> dict[str, float]:
    numbers = {"": statistics.median(values), "_min": min(values), "_max": max(values)}
    return {f"{name}{suffix}": round(value, 3) for suffix, value in numbers.items()}


def _mean_cores(blocks: list[Block]) -> dict[str, float]:
    kinds = sorted({kind for block in blocks for kind in block.cores})
    return {
        kind: round(statistics.mean(block.cores.get(kind, 0.0) for block in blocks), 2)
        for kind in kinds
    }
