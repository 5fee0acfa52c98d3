"""Kill parts of a deployment of two gangs of two under load, and count what its clients see.

Clients send completions one after the other, half of them streams, and compare each answer with
the one that an undisturbed engine gives. A request ends in one of :data:`ENDS`. After each kill
the policy is changed; the deployment has recovered when all four ranks run the new version.
"""

import asyncio
import itertools
import random
import statistics
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console

from sere_ray import assets
from sere_ray.bench.completions import Reply, complete
from sere_ray.bench.servers import APP, served
from sere_ray.bench.stand_in import ENVIRONMENT, expected_words
from sere_ray.calibration.synthetic import synthetic_artifact
from sere_ray.policy.tiers import HEADER
from sere_ray.serve.client import request
from sere_ray.util.errors import SereError
from sere_ray.util.ports import free_port
from sere_ray.util.processes import ENGINE, processes_named
from sere_ray.util.progress import progress

RANKS = 4
"""Two gangs of two."""
TOKENS = 24
REQUEST_SECONDS = 60.0
"""A client that waits longer hangs."""
RECOVERY_SECONDS = 240.0
PAUSE_SECONDS = 2.0
"""How long load runs undisturbed between a recovery and the next kill."""
ENDS = ("answers", "clean_errors", "wrong_answers", "hung_clients", "unclean_errors")
"""Clean: 503 with ``Retry-After`` in OpenAI's form, or a stream whose last event says the same.
Unclean: anything else that is no whole answer, such as 500 or a broken connection."""
VICTIMS = {
    "rank": f"ray::ServeReplica:{APP}:SereGangServer",
    "engine": ENGINE,
    "router actor": "ray::RouterActor",
}
"""What can be killed, as result files call it, and the title of its process. The router actor is
the policy actor. Only a real rank has an engine as a process of its own."""


@dataclass
class Clients:
    """Clients that send until told to stop.

    Args:
        url: of the deployment.
        model_id: what they ask for.
        expected: the answer to each prompt; None = the stand-in's.
    """

    url: str
    model_id: str
    expected: Mapping[str, str] | None = None
    ends: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """How many errors there were, by what the client saw."""
    error_times: list[float] = field(default_factory=list)
    stop: bool = False

    async def client(self, number: int, session: aiohttp.ClientSession) -> None:
        """Send one request after the other."""
        for turn in itertools.count(number):
            if self.stop:
                return
            prompt, expected = self._question()
            end, reason = await self._ask(session, prompt, expected, stream=turn % 2 == 0)
            self.ends[end] += 1
            if reason:
                self.reasons[reason] += 1
                self.error_times.append(time.monotonic())
                await asyncio.sleep(0.1)

    def _question(self) -> tuple[str, str]:
        """A prompt, unlike any other with the stand-in, and its answer."""
        if self.expected is not None:
            return random.choice(list(self.expected.items()))
        prompt = str(uuid.uuid4())
        return prompt, "".join(expected_words(prompt, TOKENS))

    async def _ask(
        self, session: aiohttp.ClientSession, prompt: str, expected: str, *, stream: bool
    ) -> tuple[str, str | None]:
        try:
            body = _body(self.model_id, prompt, stream=stream)
            reply = await complete(session, self.url, body, {HEADER: "exact"})
        except TimeoutError:
            return "hung_clients", f"no end after {REQUEST_SECONDS:.0f} s"
        except aiohttp.ClientError as error:
            return "unclean_errors", type(error).__name__
        return judge(reply, expected)


def judge(reply: Reply, expected: str) -> tuple[str, str | None]:
    """How a request ended, of :data:`ENDS`, and what the client saw if it was an error."""
    if reply.complete and reply.status == 200:
        return ("answers", None) if reply.text == expected else ("wrong_answers", "wrong answer")
    if reply.status == 503 and reply.error and reply.retry_after:
        return "clean_errors", f"503 {reply.error}"
    if reply.status == 200 and reply.error:
        return "clean_errors", f"event {reply.error}"
    return "unclean_errors", f"{reply.status} {reply.error or reply.text[:60]}"


def _body(model_id: str, prompt: str, *, stream: bool) -> dict[str, Any]:
    options = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": stream}
    return {"model": model_id, "prompt": prompt, **options}


def answers_of(url: str, model_id: str, prompts: list[str]) -> dict[str, str]:
    """What an undisturbed deployment answers, exact tier, one request at a time."""

    async def ask() -> dict[str, str]:
        async with _session() as session:
            body = {p: _body(model_id, p, stream=False) for p in prompts}
            return {
                p: (await complete(session, url, body[p], {HEADER: "exact"})).text for p in prompts
            }

    return asyncio.run(ask())


def run_chaos(
    kills: int,
    *,
    streams: int,
    save: Callable[[dict[str, Any]], None],
    console: Console | None,
) -> None:
    """Start two gangs of two stand-in engines and kill parts of them: every third time the router
    actor, else a rank.

    Args:
        kills: how many.
        streams: clients at a time.
        save: called after each recovery with the result so far, and at the end.
        console: where progress goes.

    Raises:
        SereError: the deployment does not start or does not recover.
    """
    victims = ["router actor" if i % 3 == 2 else "rank" for i in range(kills)]
    with tempfile.TemporaryDirectory(prefix="sere-chaos-") as name:
        folder, port = Path(name), free_port()
        synthetic_artifact(assets.MODEL).save(folder / "a.safetensors")
        arguments = {
            "model": str(assets.MODEL),
            "model_id": "stand-in",
            "num_replicas": 2,
            "data_parallel_size": 2,
            "sere": {"similarity": str(folder / "a.safetensors"), "select_top_k": 2},
            "metrics_interval_s": None,
            "env": {"HF_HUB_OFFLINE": "1", **ENVIRONMENT},
        }
        with served(folder, port, arguments, proxy="default") as process:
            load = Clients(f"http://127.0.0.1:{port}", "stand-in")
            root = psutil.Process(process.pid)
            save(disturb(load, victims, root=root, streams=streams, console=console, save=save))


def disturb(
    load: Clients,
    victims: list[str],
    *,
    root: psutil.Process,
    streams: int,
    console: Console | None,
    save: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Kill one victim after the other under load.

    Args:
        load: on a deployment of two gangs of two with a policy.
        victims: keys of :data:`VICTIMS`, in order.
        root: the process below which the deployment's processes are.
        streams: clients at a time.
        console: where progress goes.
        save: called after each recovery with the result so far.

    Returns:
        The content of the result file.

    Raises:
        SereError: the deployment does not recover, or has no such process.
    """
    return asyncio.run(_disturb(load, victims, root, streams, console, save))


async def _disturb(
    load: Clients,
    victims: list[str],
    root: psutil.Process,
    streams: int,
    console: Console | None,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    kills: list[dict[str, Any]] = []
    async with _session() as session:
        clients = [asyncio.create_task(load.client(i, session)) for i in range(streams)]
        with progress(console, len(victims), task="chaos", unit="kills") as advance:
            for number, victim in enumerate(victims):
                await asyncio.sleep(PAUSE_SECONDS)
                kills.append(await _kill(load, victim, root, number))
                save(_summary(load, kills))
                advance(1)
        await asyncio.sleep(PAUSE_SECONDS)
        load.stop = True
        await asyncio.gather(*clients)
    return _summary(load, kills)


async def _kill(load: Clients, victim: str, root: psutil.Process, number: int) -> dict[str, Any]:
    """Kill one process, change the policy, and wait until all ranks run it."""
    name = VICTIMS[victim]
    found = processes_named(root, name)
    if not found:
        raise SereError(f"no process {name!r} below {root.pid}: is this a deployment of two gangs?")
    process = random.choice(found)
    version = (await asyncio.to_thread(request, load.url, "policy"))["version"]
    before, start = load.ends.copy(), time.monotonic()
    process.kill()
    change = asyncio.create_task(_change_policy(load.url, select_top_k=1 + number % 2))
    while not await _all_run_newer(load.url, version):
        if time.monotonic() - start > RECOVERY_SECONDS:
            raise SereError(f"a killed {victim} has not come back in {RECOVERY_SECONDS:.0f} s")
        await asyncio.sleep(0.25)
    recovery = time.monotonic() - start
    await change
    errors = [t - start for t in load.error_times if t >= start]
    return {
        "victim": victim,
        "recovery_s": round(recovery, 2),
        "answers_meanwhile": load.ends["answers"] - before["answers"],
        "errors": len(errors),
        "last_error_s": round(max(errors), 2) if errors else None,
    }


async def _change_policy(url: str, **keys: Any) -> None:
    """Set a policy as soon as a policy actor takes it."""
    while True:
        with suppress(SereError):
            await asyncio.to_thread(request, url, "policy", keys)
            return
        await asyncio.sleep(0.25)


async def _all_run_newer(url: str, version: int) -> bool:
    """Whether all ranks run a policy newer than ``version``: no rank that died meanwhile does."""
    try:
        status = await asyncio.to_thread(request, url, "policy")
    except SereError:
        return False
    return bool(status["version"] > version and status["replicas_settled"] == RANKS)


def _session() -> aiohttp.ClientSession:
    limits = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    return aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=0))


def _summary(load: Clients, kills: list[dict[str, Any]]) -> dict[str, Any]:
    recoveries = [kill["recovery_s"] for kill in kills]
    return {
        "kills": len(kills),
        "requests": load.ends.total(),
        **{end: load.ends[end] for end in ENDS},
        "recovery_s_p50": round(statistics.median(recoveries), 2),
        "recovery_s_max": max(recoveries),
        "errors_seen": dict(load.reasons),
        "killed": kills,
    }
