"""What a soak does to a deployment while it is loaded, and what it watches meanwhile."""

import itertools
import json
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request

import psutil

from sere_ray.loadtest.client import now
from sere_ray.loadtest.driver import LoadPlan
from sere_ray.loadtest.generator import Pending
from sere_ray.loadtest.policies import parse_policies, whole_policy
from sere_ray.serve.client import set_policy
from sere_ray.util.errors import SereError
from sere_ray.util.http import open_url
from sere_ray.util.processes import ENGINE, processes, processes_named

_STEP_SECONDS = 5.0
_POLICIES = "S=2,S=1,off,S=1:threshold=0.3,observe"
_GOOD_REQUEST = (
    b'{"messages": [{"role": "user", "content": "1"}], "model": "MODEL", "max_tokens": 1}'
)
_BAD_REQUESTS: tuple[tuple[bytes, range], ...] = (
    (b"{nonsense", range(400, 401)),
    (b'{"model": "nobody", "messages": []}', range(400, 500)),
    (b'{"messages": "text", "model": "MODEL"}', range(400, 500)),
    (b'{"messages": [], "model": "MODEL", "max_tokens": -1}', range(400, 500)),
)


@dataclass
class SoakLog:
    """What was done to the deployment during a soak, and how it answered."""

    policy_changes: int = 0
    policy_changes_refused: int = 0
    disconnects: int = 0
    bad_requests: int = 0
    wrong_statuses: list[tuple[float, str]] = field(default_factory=list)
    """When and what."""
    killed_at: float | None = None
    usage: list[dict[str, float]] = field(default_factory=list)
    kinds: list[dict[str, float]] = field(default_factory=list)
    """Memory by kind of process, each time."""


def check_serving(plan: LoadPlan, url: str) -> None:
    """Send one good request.

    Raises:
        SereError: it is not answered with status 200.
    """
    if (status := _status(plan, url, _GOOD_REQUEST)) != 200:
        raise SereError(
            f"{url}: a good request ends with {status or 'no answer'}; is it serving yet?"
        )


def disturb(
    plan: LoadPlan,
    url: str,
    pid: int,
    before: dict[str, Any],
    loads: Sequence[Pending],
    kill_rank: bool,
    log: SoakLog,
) -> None:
    """Change policies, hang up, ask nonsense and watch memory, until the loads have ended.

    Args:
        plan: whom to ask.
        url: of the deployment.
        pid: of its `sere-ray serve`.
        before: keys of the policy that was found.
        loads: that run meanwhile.
        kill_rank: kill an engine with SIGKILL after half of the plan's seconds.
        log: what was done and seen is added to it.
    """
    changes = parse_policies(_POLICIES).items()
    policies = itertools.cycle([whole_policy(before, change, name) for name, change in changes])
    bad = itertools.cycle(_BAD_REQUESTS)
    half = now() + plan.seconds / 2
    while not all(load.done() for load in loads):
        if kill_rank and log.killed_at is None and now() >= half:
            first_engine(pid).kill()
            log.killed_at = now()
        try:
            set_policy(url, next(policies))
            log.policy_changes += 1
        except SereError:
            log.policy_changes_refused += 1  # reported, but no fault: see soak.py
        _disconnect(plan, url, log)
        _ask_nonsense(plan, url, *next(bad), log)
        memory, handles = usage(pid)
        log.kinds.append(memory)
        log.usage.append({"at": now(), "memory_mib": sum(memory.values()), "handles": handles})
        time.sleep(_STEP_SECONDS)


def _disconnect(plan: LoadPlan, url: str, log: SoakLog) -> None:
    """Ask for a long stream and hang up at its first bytes."""
    parts = urlsplit(url)
    messages = [{"role": "user", "content": "Work out 23 + 48 - 17."}]
    document = {"model": plan.target.model, "messages": messages, "max_tokens": 200}
    body = json.dumps({**document, "stream": True, "ignore_eos": True}).encode()
    key = f"Authorization: Bearer {plan.target.keys[0].key}\r\n" if plan.target.keys else ""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n{key}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    try:
        address = (parts.hostname, parts.port or 80)
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(head.encode() + body)
            connection.recv(64)
        log.disconnects += 1
    except OSError:
        log.wrong_statuses.append((now(), "disconnecting client was not served"))


def _ask_nonsense(plan: LoadPlan, url: str, body: bytes, expected: range, log: SoakLog) -> None:
    """A bad request must be refused with its status, and nothing else."""
    log.bad_requests += 1
    status = _status(plan, url, body)
    if status not in expected:
        log.wrong_statuses.append((now(), f"{status} for {body[:40].decode()}"))


def _status(plan: LoadPlan, url: str, body: bytes) -> int:
    """Status of the answer to a request; 0 = no answer. ``MODEL`` in the body is replaced."""
    headers = {"Content-Type": "application/json"}
    if plan.target.keys:
        headers["Authorization"] = f"Bearer {plan.target.keys[0].key}"
    data = body.replace(b"MODEL", plan.target.model.encode())
    try:
        with open_url(Request(f"{url}/v1/chat/completions", data, headers), 30) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code
    except (URLError, OSError):
        return 0


def usage(pid: int) -> tuple[dict[str, float], int]:
    """Memory in MiB by kind of process, and open files of all of them.

    A page that processes share counts once: each has its share of it (PSS).

    Args:
        pid: of a `sere-ray serve`; its children are counted, too.

    Raises:
        SereError: there is no such process.
    """
    memory: Counter[str] = Counter()
    files = 0
    for title, process in processes(_root(pid)):
        with suppress(psutil.Error):  # it has just ended
            memory[_kind(title)] += process.memory_full_info().pss
            files += process.num_fds()
    return {kind: size / 2**20 for kind, size in memory.items()}, files


def first_engine(pid: int) -> psutil.Process:
    """An engine below a process.

    Raises:
        SereError: there is none, or no such process.
    """
    engines = processes_named(_root(pid), ENGINE)
    if not engines:
        raise SereError(f"--pid {pid}: no engine process below it to kill; see --no-kill-rank")
    return engines[0]


def _root(pid: int) -> psutil.Process:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        raise SereError(f"--pid {pid}: no such process; give that of `sere-ray serve`") from None


def _kind(title: str) -> str:
    """What Ray and vLLM call a process, without the method it runs; otherwise its program."""
    _, separator, name = title.partition("::")
    return name.split(".")[0] if separator else title.split("/")[-1]
