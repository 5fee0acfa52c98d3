"""``sere-ray tune``: the settings that read the fewest experts within a budget of quality.

A setting fits if the bad end of its 95 % interval keeps the budget at every batch size that it is
for. Each batch size asked for ends a range of sizes with a setting of its own, which has to fit at
both ends of the range and reads the fewest experts there. All ranges have one rule.

With a budget of tasks KL or agreement is a gate, and the answers to tasks decide
(:mod:`sere_ray.evaluation.tune_tasks`).

What is found on one text is checked on a second one, which had no part in the choice.
"""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console

from sere_ray.evaluation.budget import Budget, Candidate, Text
from sere_ray.evaluation.evaluator import EvaluationPlan, Evaluator
from sere_ray.evaluation.search import best_setting
from sere_ray.evaluation.settings import rules_of
from sere_ray.evaluation.task_rows import Rows, loss_end
from sere_ray.evaluation.tune_tasks import TaskBudget, TaskText, best_by_tasks, teller
from sere_ray.policy.policy import RULE_NAMES
from sere_ray.policy.row_ranges import MOST_RANGES
from sere_ray.util.errors import SereError
from sere_ray.util.files import atomic_path
from sere_ray.util.progress import waiting


def tune(
    plan: EvaluationPlan,
    check_data: str,
    budget: Budget,
    rules: tuple[str, ...] | None,
    console: Console,
    *,
    by_rows: bool,
    of_tasks: TaskBudget | None = None,
) -> dict[str, Any]:
    """The content of a report: the policy, what it was predicted to do, what it did.

    Args:
        plan: model and text to choose on; its batch sizes are those that must keep the budget.
        check_data: a second text.
        budget: what may be lost.
        rules: names of the rules to choose among; None = served ones that the artifact allows.
        console: where progress goes.
        by_rows: a setting for each range of batch sizes, or else one for all.
        of_tasks: what tasks may lose; None = the budget decides alone.

    Raises:
        SereError: something cannot be used, or no setting keeps the budget.
    """
    budget.check()
    if of_tasks:
        of_tasks.check()
    ranges = ranges_between(plan.batches) if by_rows else [plan.batches]
    if len(ranges) > MOST_RANGES + 1:
        raise SereError(
            f"--batches: {len(ranges)} sizes, but a policy has at most {MOST_RANGES} entries and "
            "one setting for more rows; name fewer, or use --one-setting"
        )
    evaluator = Evaluator(plan)
    rules = rules or rules_of(evaluator.artifact, RULE_NAMES)
    text, tell = Text(evaluator, plan.data, budget), teller(console)
    tasks = TaskText(evaluator, plan.data, of_tasks, 0, tell) if of_tasks else None
    second_tasks = TaskText(evaluator, check_data, of_tasks, 1, tell) if of_tasks else None
    best: Tuned | None = None
    tried: list[dict[str, Any]] = []
    for rule in rules:
        with waiting(console, f"trying {rule}"):
            found = best_of_rule(text, rule, ranges, tasks)
        reads = found.whole.reads if found else None
        tried.append({"rule": rule, "experts_read_mean": round(reads, 3) if reads else None})
        if found and (best is None or found.whole.reads < best.whole.reads):
            best = found
    if best is None:
        raise SereError(
            f"no setting of {', '.join(rules)} keeps the budget at batch sizes "
            f"{', '.join(map(str, plan.batches))}; allow more, or give more text: with "
            f"{plan.sequences} windows intervals are wide{tasks.why_none() if tasks else ''}"
        )
    with waiting(console, "checking on the second text"):
        second = Text(evaluator, check_data, budget)
        checked = second.attempt(best.whole.keys)
        answers = _answers(best, tasks, second_tasks)
    kept = checked.fits
    if of_tasks:
        kept = all(loss_end(row) <= of_tasks.max_loss for row in answers["tasks_checked"])
    return {
        "policy": {"similarity": str(plan.similarity), **_plain(best.whole.keys)},
        "budget": _told(budget, of_tasks),
        "tried": tried,
        "predicted": text.report(best.whole.found),
        "checked": second.report(checked.found),
        **answers,
        "keeps_the_budget_on_the_second_text": kept,
    }


def _told(budget: Budget, of_tasks: TaskBudget | None) -> dict[str, Any]:
    told = {name: value for name, value in vars(budget).items() if value is not None}
    return told | ({"task_loss": of_tasks.max_loss} if of_tasks else {})


def _answers(best: "Tuned", tasks: TaskText | None, second: TaskText | None) -> dict[str, Rows]:
    """What tasks say of each range's setting at both of its ends, on both texts."""
    return {
        name: [row for part in best.parts for row in of_text.rows(part.keys, list(part.found))]
        for name, of_text in (("tasks_predicted", tasks), ("tasks_checked", second))
        if of_text
    }


def write_policy(policy: dict[str, Any], path: Path) -> None:
    """A YAML file of policy keys: what `sere:` of a deployment file holds."""
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(policy, sort_keys=False), encoding="utf-8")


def ranges_between(batches: Sequence[int]) -> list[tuple[int, ...]]:
    """The ranges between batch sizes, each by its two ends; the first also holds smaller batches.

    Example:
        >>> ranges_between((16, 4, 8))
        [(4,), (4, 8), (8, 16)]
    """
    ends = sorted(set(batches))
    return [(ends[0],), *itertools.pairwise(ends)]


class Tuned(NamedTuple):
    """The settings of a rule."""

    whole: Candidate
    """All ranges as one."""
    parts: list[Candidate]
    """Of each range, measured at its ends."""


def best_of_rule(
    text: Text, rule: str, ranges: list[tuple[int, ...]], tasks: TaskText | None = None
) -> Tuned | None:
    """The settings of a rule that read the fewest experts and fit; None where none do."""
    parts: list[Candidate] = []
    for batches in ranges:
        if tasks:
            best = best_by_tasks(text, tasks, rule, batches)
        else:
            attempt = functools.partial(text.attempt, batches=batches)
            best = best_setting(attempt, rule, text.routing)
        if best is None:
            return None
        parts.append(best)
    keys = joined({r[-1]: part.keys for r, part in zip(ranges, parts, strict=True)})
    return Tuned(text.attempt(keys), parts)


def joined(settings: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One setting of several, by the most rows that each is for; the last is for more, too.

    An entry says null where only the last one gives a key.
    """
    last = list(settings.values())[-1]
    entries = [
        {"up_to": up_to, **{key: keys.get(key) for key in {**last, **keys} if key != "rule"}}
        for (up_to, keys), (_, following) in itertools.pairwise(settings.items())
        if keys != following
    ]
    return {**last, "by_rows": entries} if entries else last


def _plain(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys that are not null, with numbers short enough to read."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(part) for part in value]
        if isinstance(value, dict):  # an entry, where null has a meaning
            return {key: short(part) for key, part in value.items()}
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return {key: short(value) for key, value in keys.items() if value is not None}
