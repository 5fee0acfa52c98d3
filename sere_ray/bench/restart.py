"""How soon a gang starts, and answers again after one of its ranks was killed."""

import asyncio
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console

from sere_ray import assets
from sere_ray.bench.completions import complete
from sere_ray.bench.engines import on_gpu
from sere_ray.bench.servers import served
from sere_ray.calibration import calibrate
from sere_ray.serve.replica import FORK_SERVER
from sere_ray.util.errors import SereError
from sere_ray.util.ports import free_port
from sere_ray.util.processes import ENGINE, family, processes_named
from sere_ray.util.progress import progress

PAUSE_SECONDS = 3.0
"""How long a deployment answers undisturbed before the next kill."""
SEQUENCES = 20
"""Of text that the artifact is from; what it says does not matter here."""
MOST_SECONDS = 300.0
AGAIN_SECONDS = 0.5
"""After which a client that was refused asks again."""
_BODY = {"model": "demo", "prompt": "Work out 1 + 1.", "max_tokens": 4, "temperature": 0}


def run_restart(
    kills: int,
    *,
    ranks: int,
    compiled: bool,
    proxies: Iterable[str],
    save: Callable[[dict[str, Any]], None],
    console: Console | None,
) -> None:
    """Start the demo model with engines forked and started anew, in turn, and kill an engine each.

    Args:
        kills: of each arm; every one in a deployment of its own.
        ranks: of the gang.
        compiled: let vLLM compile its graph; False = eager.
        proxies: ``direct``, ``default``.
        save: called after each kill with the result so far.
        console: where progress goes.

    Raises:
        SereError: the deployment does not start, or does not come back.
    """
    rows: list[dict[str, Any]] = []
    device = "gpu" if on_gpu() else "cpu"
    # On a GPU nothing is forked.
    arms = [(p, f) for p in proxies for f in ((False,) if device == "gpu" else (True, False))]
    with (
        tempfile.TemporaryDirectory(prefix="sere-restart-") as name,
        progress(console, kills * len(arms), task="restart", unit="kills") as advance,
    ):
        similarity = Path(name, "demo.safetensors")
        calibrate(
            str(assets.MODEL), data=str(assets.CALIBRATION), out=similarity, sequences=SEQUENCES
        )
        for _ in range(kills):
            for proxy, forked in arms:
                found = _arm(similarity, device, ranks, proxy, compiled=compiled, forked=forked)
                about = {"device": device, "ranks": ranks, "proxy": proxy, "compiled": compiled}
                rows.append({**about, "forked": forked, **found})
                save({"model": "demo", "rows": rows})
                advance(1)


def _arm(
    similarity: Path, device: str, ranks: int, proxy: str, *, compiled: bool, forked: bool
) -> dict[str, Any]:
    """One deployment, one kill."""
    with tempfile.TemporaryDirectory(prefix="sere-restart-") as name:
        folder, port = Path(name), free_port()
        arguments = {
            "model": str(assets.MODEL),
            "model_id": _BODY["model"],
            "device": device,
            "data_parallel_size": ranks,
            "sere": {"similarity": str(similarity), "select_top_k": 2},
            "engine": {"max_model_len": 512, "max_num_seqs": 16, "enforce_eager": not compiled},
            "limits": {"queue_while_restarting_s": MOST_SECONDS},
            "env": {"HF_HUB_OFFLINE": "1", FORK_SERVER: str(int(forked))},
        }
        begun = time.monotonic()
        with served(folder, port, arguments, proxy=proxy) as process:
            start, root = time.monotonic() - begun, psutil.Process(process.pid)
            used = _processor_seconds(root)
            return {
                "start_s": round(start, 2),
                "start_processor_s": round(used, 2),
                **asyncio.run(_kill(f"http://127.0.0.1:{port}", root)),
            }


async def _kill(url: str, root: psutil.Process) -> dict[str, Any]:
    """Kill an engine; one client asks until it has an answer, then once more."""
    limits = aiohttp.ClientTimeout(total=MOST_SECONDS)
    async with aiohttp.ClientSession(timeout=limits) as session:
        if not (await complete(session, url, _BODY, {})).complete:
            raise SereError("the deployment does not answer")
        await asyncio.sleep(PAUSE_SECONDS)
        begun = time.monotonic()
        random.choice(processes_named(root, ENGINE)).kill()
        failed = 0
        while True:
            reply = await complete(session, url, _BODY, {})
            if reply.complete:
                break
            failed += 1
            if time.monotonic() - begun > MOST_SECONDS:
                raise SereError(f"no answer within {MOST_SECONDS:.0f} s of the kill: {reply}")
            await asyncio.sleep(AGAIN_SECONDS)
        seconds = time.monotonic() - begun
    return {"seconds_until_answers": round(seconds, 2), "failed": failed}


def _processor_seconds(root: psutil.Process) -> float:
    """Of all processes that run now."""
    times = [process.cpu_times() for process in family(root)]
    return float(sum(each.user + each.system for each in times))
