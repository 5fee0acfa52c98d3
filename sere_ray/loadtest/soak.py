"""A deployment under everything at once: load, policy changes, rude clients, a killed rank.

Half of the load asks for the exact tier, whose answers are known: a wrong one that is the right
answer of another prompt was crossed. A failure is expected only while a killed rank is replaced.
"""

import bisect
import itertools
import json
import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from rich.console import Console

from sere_ray.assets import final_answer
from sere_ray.loadtest.arms import parse_policies, whole_policy
from sere_ray.loadtest.client import Outcome, now
from sere_ray.loadtest.driver import Load, Plan
from sere_ray.loadtest.endpoint import kept_policy
from sere_ray.loadtest.figures import rounded
from sere_ray.loadtest.pool import Pending, generator
from sere_ray.loadtest.processes import first_engine, usage
from sere_ray.serve.client import set_policy
from sere_ray.util.errors import SereError

STREAMS = 4
"""Of each tier."""
GROWTH = 0.05
"""Of memory and handles, from the first third's mean to the last third's."""
_STEP_SECONDS = 5.0
_CLEAN_SECONDS = 10.0
"""Without a failure, after which a gang counts as replaced."""
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
class _Log:
    """What the disturbing side did and saw."""

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


def run_soak(
    plan: Plan,
    *,
    url: str,
    pid: int,
    kill_rank: bool,
    save: Callable[[dict[str, Any]], None],
    console: Console,
) -> None:
    """Load and disturb a deployment for the plan's seconds.

    Args:
        plan: target, workload with known answers, and duration.
        url: of the deployment.
        pid: of its `sere-ray serve` on this machine; its children are watched too.
        kill_rank: kill an engine with SIGKILL after half of the time.
        save: called with the content of the result file.
        console: where the figures are printed.

    Raises:
        SereError: ``pid`` is none of a deployment, or it does not answer, before any load; or
            something was lost, crossed or grew, after the file is written.
    """
    usage(pid)
    if kill_rank:
        first_engine(pid)
    if (status := _status(plan, url, _GOOD_REQUEST)) != 200:
        raise SereError(
            f"{url}: a good request ends with {status or 'no answer'}; is it serving yet?"
        )
    log = _Log()
    with (
        kept_policy(url, console) as before,
        generator() as exact,
        generator() as usual,
    ):
        marked = tuple(e.model_copy(update={"tier": "exact"}) for e in plan.entries)
        begin = now()
        loads = [
            exact.begin(replace(plan, entries=marked, streams=STREAMS)),
            usual.begin(replace(plan, streams=STREAMS)),
        ]
        _disturb(plan, url, pid, before, loads, kill_rank, log)
        results = [load.result() for load in loads]
    content = _content(plan, results, log, begin)
    save(content)
    for name, value in content["rows"][0].items():
        console.print(f"{name}: {value}", markup=False, highlight=False)
    _judge(content["rows"][0])


def _disturb(
    plan: Plan,
    url: str,
    pid: int,
    before: dict[str, Any],
    loads: Sequence[Pending],
    kill_rank: bool,
    log: _Log,
) -> None:
    """Change, disconnect, ask nonsense and watch, until the loads have ended."""
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
            log.policy_changes_refused += 1  # reported; `_judge` lets it pass
        _disconnect(plan, url, log)
        _ask_nonsense(plan, url, *next(bad), log)
        memory, handles = usage(pid)
        log.kinds.append(memory)
        log.usage.append({"at": now(), "memory_mib": sum(memory.values()), "handles": handles})
        time.sleep(_STEP_SECONDS)


def _disconnect(plan: Plan, url: str, log: _Log) -> None:
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


def _ask_nonsense(plan: Plan, url: str, body: bytes, expected: range, log: _Log) -> None:
    """A bad request must be refused with its status, and nothing else."""
    log.bad_requests += 1
    status = _status(plan, url, body)
    if status not in expected:
        log.wrong_statuses.append((now(), f"{status} for {body[:40].decode()}"))


def _status(plan: Plan, url: str, body: bytes) -> int:
    """Of the answer to a request; 0: there is none. ``MODEL`` in the body is the model's name."""
    headers = {"Content-Type": "application/json"}
    if plan.target.keys:
        headers["Authorization"] = f"Bearer {plan.target.keys[0].key}"
    data = body.replace(b"MODEL", plan.target.model.encode())
    try:
        with urlopen(Request(f"{url}/v1/chat/completions", data, headers), timeout=30) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code
    except (URLError, OSError):
        return 0


def _content(plan: Plan, loads: list[Load], log: _Log, begin: float) -> dict[str, Any]:
    exact, usual = (load.measured for load in loads)
    every = [*exact, *usual]
    recovered = _recovered(every, log.killed_at)
    failed = [o for o in every if o.error is not None]
    outside = [o for o in failed if not _while_down(o.ended, log.killed_at, recovered)]
    wrong_statuses = Counter(
        what for at, what in log.wrong_statuses if not _while_down(at, log.killed_at, recovered)
    )
    answered = [o for o in exact if o.error is None]
    wrong = [o for o in answered if final_answer(o.text) != o.label]
    known = {entry.answer for entry in plan.entries}
    row: dict[str, Any] = {
        "minutes": rounded(plan.seconds / 60),
        "requests": len(every),
        "failed_while_a_rank_was_replaced": len(failed) - len(outside),
        "lost": len(outside),
        "lost_kinds": dict(Counter(str(o.error) for o in outside).most_common(5)),
        "exact_answers": len(answered),
        "exact_answers_wrong": len(wrong),
        "crossed": sum(final_answer(o.text) in known for o in wrong),
        "policy_changes": log.policy_changes,
        "policy_changes_refused": log.policy_changes_refused,
        "disconnects": log.disconnects,
        "bad_requests": log.bad_requests,
        "bad_requests_answered_wrongly": dict(wrong_statuses),
        "rank_killed": log.killed_at is not None,
        "seconds_until_answers_came_again": recovered
        and log.killed_at
        and rounded(recovered - log.killed_at),
    }
    for name in ("memory_mib", "handles"):
        row |= _growth(name, log.usage, name)
        later = [one for one in log.usage if recovered is not None and one["at"] > recovered]
        if later:  # the new gang is smaller at first: it is watched on its own, too
            row |= _growth(name, later, f"{name}_after_the_kill")
    row["memory_mib_by_kind"] = _thirds_by_kind(log.kinds)
    course = [
        {name: rounded(value - begin if name == "at" else value) for name, value in one.items()}
        for one in log.usage
    ]
    return {"model": plan.target.model, "streams": 2 * STREAMS, "rows": [row], "usage": course}


def _recovered(outcomes: list[Outcome], killed_at: float | None) -> float | None:
    """When answers came again: the first after the kill with no failure for a while after it.

    A failure later than that is no longer excused.
    """
    if killed_at is None:
        return None
    answers = sorted(o.ended for o in outcomes if o.error is None and o.ended >= killed_at)
    failures = sorted(o.ended for o in outcomes if o.error is not None and o.ended >= killed_at)
    for last, following in itertools.pairwise([killed_at, *failures, math.inf]):
        at = bisect.bisect_left(answers, last)
        if at < len(answers) and following - answers[at] >= _CLEAN_SECONDS:
            return answers[at]
    return None


def _while_down(at: float, killed_at: float | None, recovered: float | None) -> bool:
    return killed_at is not None and at >= killed_at and (recovered is None or at <= recovered)


def _growth(name: str, usage: list[dict[str, float]], label: str) -> dict[str, float | None]:
    """Means of the first and last third, and the growth between them."""
    first, last = _thirds([one[name] for one in usage])
    return {
        f"{label}_first_third": rounded(first),
        f"{label}_last_third": rounded(last),
        f"{label}_growth": rounded(last / first - 1),
    }


def _thirds(values: list[float]) -> tuple[float, float]:
    third = max(len(values) // 3, 1)
    return sum(values[:third]) / third, sum(values[-third:]) / third


def _thirds_by_kind(kinds: list[dict[str, float]]) -> dict[str, list[float | None]]:
    """First and last third of each kind of process, from 1 MiB on: what grew, if something did."""
    names = sorted(set().union(*kinds))
    thirds = {name: _thirds([one.get(name, 0.0) for one in kinds]) for name in names}
    return {name: [rounded(m) for m in means] for name, means in thirds.items() if max(means) >= 1}


def _judge(row: dict[str, Any]) -> None:
    faults = [name for name in ("lost", "crossed") if row[name]]
    if row["bad_requests_answered_wrongly"]:
        faults.append("bad_requests_answered_wrongly")
    faults += [name for name in row if name.endswith("_growth") and (row[name] or 0) > GROWTH]
    if row["rank_killed"] and row["seconds_until_answers_came_again"] is None:
        faults.append("seconds_until_answers_came_again")
    if faults:
        named = ", ".join(f"{name} {row[name]}" for name in faults)
        raise SereError(f"the deployment did not hold: {named}")
