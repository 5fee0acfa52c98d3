"""Soak: does a deployment hold under load, policy changes, rude clients and a killed rank?

Half of the load asks for the exact tier, whose answers are known. A wrong answer that is the right
one of another prompt counts as *crossed*: two requests were mixed up. A failure is excused only
while a killed rank is replaced.
"""

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rich.console import Console

from sere_ray.assets import final_answer
from sere_ray.loadtest.client import Outcome, now
from sere_ray.loadtest.disturbance import SoakLog, check_serving, disturb, first_engine, usage
from sere_ray.loadtest.driver import Load, LoadPlan
from sere_ray.loadtest.figures import rounded
from sere_ray.loadtest.generator import generator
from sere_ray.loadtest.policies import kept_policy
from sere_ray.util.errors import SereError

STREAMS = 4
"""Closed-loop users of each half of the load: exact tier, and default tier."""
GROWTH = 0.05
"""How much memory and open files may grow, from the mean of the first third to that of the last."""
_CLEAN_SECONDS = 10.0
"""Seconds without a failure after which a killed gang counts as replaced."""


def run_soak(
    plan: LoadPlan,
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
    check_serving(plan, url)
    log = SoakLog()
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
        disturb(plan, url, pid, before, loads, kill_rank, log)
        results = [load.result() for load in loads]
    content = _content(plan, results, log, begin)
    save(content)
    for name, value in content["rows"][0].items():
        console.print(f"{name}: {value}", markup=False, highlight=False)
    _judge(content["rows"][0])


def _content(plan: LoadPlan, loads: list[Load], log: SoakLog, begin: float) -> dict[str, Any]:
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
