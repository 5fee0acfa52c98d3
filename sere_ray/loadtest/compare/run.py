"""Every task under every policy of a running deployment, and what each loses against exact."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console

from sere_ray.evaluation.task_rows import worst_tasks
from sere_ray.loadtest.compare.ask import Endpoint
from sere_ray.loadtest.compare.json_task import run_json
from sere_ray.loadtest.compare.lm_eval_task import find_lm_eval, run_lm_eval, task_name
from sere_ray.loadtest.compare.long_task import pieces, run_long
from sere_ray.loadtest.compare.scores import Scores, compared
from sere_ray.loadtest.policies import kept_policy, whole_policy
from sere_ray.observe.stats import means
from sere_ray.serve.client import Deployment, set_policy
from sere_ray.util.errors import SereError
from sere_ray.util.progress import waiting

BUILT_IN = ("json", "long")
_EXACT = "off"
_ITEMS = 200
"""Of a built-in task, where nobody says."""
_HALF_WIDTH = 0.005


@dataclass(frozen=True)
class ComparePlan:
    """What is asked."""

    tasks: tuple[str, ...]
    items: int | None
    """Of each task; None = all of lm-eval's, 200 of ours."""
    data: str | None
    """Text that ``long`` continues; None = the demo's held-out text."""
    text_column: str
    seed: int
    lm_eval_options: tuple[str, ...]

    def check(self) -> None:
        """Refuse before anything is asked what could not be asked later.

        Raises:
            SereError: a task twice, a file that is no task, no lm-eval, no text.
        """
        for i, task in enumerate(self.tasks):
            if task in self.tasks[:i]:
                raise SereError(f"--tasks: {task!r} is there twice")
            if task not in BUILT_IN:
                task_name(task)
                find_lm_eval(task)
        if "long" in self.tasks:
            pieces(self.data, self.text_column)

    def run(self, task: str, endpoint: Endpoint) -> list[Scores]:
        """Ask one task, as the deployment is.

        Raises:
            SereError: it cannot be asked.
        """
        if task == "json":
            return run_json(endpoint, self.items or _ITEMS, self.seed)
        if task == "long":
            text = self.data, self.text_column
            return run_long(endpoint, self.items or _ITEMS, self.seed, *text)
        return run_lm_eval(endpoint, task, self.items, list(self.lm_eval_options))


def run_compare(
    plan: ComparePlan,
    policies: Mapping[str, Mapping[str, Any]],
    endpoint: Endpoint,
    save: Callable[[dict[str, Any]], None],
    console: Console,
) -> dict[str, Any]:
    """Every task of the exact model first, then under each policy; the policy is put back.

    Args:
        plan: what is asked, checked.
        policies: name and changed keys of each, from
            :func:`sere_ray.loadtest.policies.parse_policies`, checked.
        endpoint: a deployment of ours.
        save: takes the content of a result file, after each policy.
        console: where progress goes.

    Returns:
        The content of the result file.

    Raises:
        SereError: something cannot be used; what was saved stays.
    """
    content: dict[str, Any] = {
        "model": endpoint.model,
        "concurrency": endpoint.concurrency,
        "max_tokens": endpoint.max_tokens,
        "temperature": endpoint.temperature,
        "half_width": _HALF_WIDTH,
    }
    exact: dict[str, Run] = {}
    rows: list[dict[str, Any]] = []
    with kept_policy(endpoint.url, console) as before:
        wholes = {name: whole_policy(before, change, name) for name, change in policies.items()}
        for whole in wholes.values():  # one that is refused is refused before the work
            set_policy(endpoint.url, whole)
        for name, whole in {_EXACT: {**before, "mode": _EXACT}, **wholes}.items():
            set_policy(endpoint.url, whole)
            found = {task: _ask(plan, task, endpoint, name, console) for task in plan.tasks}
            if name == _EXACT:
                exact = found
                continue
            of_policy = {"policy": name, "settings": policies[name]}
            for task, run in found.items():
                pairs = _paired(exact[task].scores, run.scores)
                rows += [of_policy | row | run.fields for row in pairs]
            save(content | {"worst": worst_of(rows), "rows": rows})
    return content | {"worst": worst_of(rows), "rows": rows}


class Run(NamedTuple):
    """A task under one policy."""

    scores: list[Scores]
    fields: dict[str, float | None]
    """What the engines counted in decode-only steps, per layer and step; seconds."""


def _ask(plan: ComparePlan, task: str, endpoint: Endpoint, policy: str, console: Console) -> Run:
    deployment, start = Deployment(endpoint.url), time.monotonic()
    deployment.read_counters()
    with waiting(console, f"{task} under {policy}"):
        scores = plan.run(task, endpoint)
    seconds = time.monotonic() - start
    counted = means(deployment.read_counters()["decode_only"])
    fields = {
        "experts_read": counted["experts_after"],
        "rows_per_step": counted["rows"],
        "seconds": seconds,
    }
    return Run(scores, {name: value and round(value, 2) for name, value in fields.items()})


def check_policies(policies: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse policies that are the exact model, or are called so.

    Raises:
        SereError: names one.
    """
    for name, keys in policies.items():
        if name == _EXACT or keys.get("mode", "on") in (_EXACT, "observe"):
            raise SereError(
                f"--policies: {name!r}: every policy is compared with the exact model anyway; "
                "name policies that re-route"
            )


def worst_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By policy the row whose interval reaches highest."""
    return {row["policy"]: row for row in worst_tasks(rows, ("policy",), ("scored_by",))}


def _paired(exact: list[Scores], found: list[Scores]) -> list[dict[str, Any]]:
    by_name = {(scores.task, scores.scored_by): scores for scores in exact}
    rows = []
    for scores in found:
        of_exact = by_name.get((scores.task, scores.scored_by))
        if of_exact is None:
            raise SereError(f"{scores.task}: no {scores.scored_by} of the exact model to pair with")
        rows.append(compared(of_exact, scores, _HALF_WIDTH))
    return rows
