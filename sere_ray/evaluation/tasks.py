"""``sere-ray tasks``: what a policy answers wrongly that the exact model has right, item by item.

Texts go through the model as in ``sere-ray evaluate``: B rows advance together, prompts are exact,
and every scored token is predicted by a decode row. Questions are asked until the interval of every
setting's relative loss is as narrow as wanted, or there are no more.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from sere_ray.calibration.loading import load_tokenizer, model_name
from sere_ray.evaluation.evaluator import EvaluationPlan, Evaluator
from sere_ray.evaluation.settings import Setting, label, looks_at_ranks
from sere_ray.evaluation.task_items import TASKS, Question, Task
from sere_ray.evaluation.task_rows import Keys, Rows, is_in, row_of, worst_tasks
from sere_ray.evaluation.task_run import Measurement, TaskPlan
from sere_ray.evaluation.task_texts import read_documents
from sere_ray.util.errors import DataError, SereError

IDENTITY = ("model", "data", "similarity", "dtype", "half_width")
"""What the rows of one result file have in common."""


def as_settings(named: dict[str, Keys], listed: list[Keys]) -> list[Keys]:
    """Policies by name and settings of a list, as one list without what says nothing.

    Raises:
        SereError: nothing, the same twice, or a policy that does not re-route.
    """
    for name, keys in named.items():
        if keys.get("mode", "on") != "on":
            raise SereError(
                f"--policies: {name!r}: every policy is compared with the exact model anyway; "
                "name policies that re-route"
            )
    found = [
        {"rule": "sere"}
        | {key: value for key, value in keys.items() if not _is_default(key, value)}
        for keys in [*named.values(), *listed]
    ]
    if not found:
        raise SereError(
            "nothing to measure: give --policies S=2,rule=margin:tau=0.01 or --settings"
        )
    twice = [keys for i, keys in enumerate(found) if keys in found[:i]]
    if twice:
        raise SereError(f"--policies, --settings: {label(twice[0])} is there twice")
    return found


def _is_default(key: str, value: object) -> bool:
    known = Setting.model_fields.get(key)
    return key in ("mode", "similarity") or (known is not None and value == known.default)


def run_tasks(
    plan: EvaluationPlan,
    wanted: TaskPlan,
    settings: list[Keys],
    console: Console | None,
    save: Callable[[dict[str, Any]], None],
    old: dict[str, Any] | None = None,
) -> None:
    """Measure every task at every batch size, and save after each what is known.

    Args:
        plan: what to load; its windows are not used.
        wanted: tasks and numbers of items.
        settings: policies without ``similarity``.
        console: where progress goes.
        save: takes the content of a result file with all rows that are new.
        old: an earlier result; what it has is not measured again.

    Raises:
        SereError: something cannot be used; says why.
    """
    wanted.check()
    for keys in settings:
        if keys.get("lda") or looks_at_ranks(keys):
            raise SereError(f"{label(keys)}: tasks take no lda and no rules that look at ranks")
    tasks = {name: TASKS[name] for name in wanted.tasks}
    asked = open_questions(plan, plan.data, tasks)
    evaluator = Evaluator(plan, tuple(dict.fromkeys(keys["rule"] for keys in settings)))
    for keys in settings:
        evaluator.bind(keys)
    content = _content(evaluator, wanted)
    before: Rows = _rows_of(old, content)
    rows: Rows = []
    for name, ask in asked.items():
        for batch in plan.batches:
            known = [row for row in before if (row["task"], row["batch"]) == (name, batch)]
            todo = [keys for keys in settings if not is_in(known, keys)]
            if not todo:
                continue
            measurement = Measurement(evaluator, tasks[name], batch)
            title = f"{name}, batch {batch}"
            rows += answered(name, measurement, ask(), todo, wanted, console, title)
            worst = {
                f"{row['rule']} {label(row['settings'])}, batch {row['batch']}": row
                for row in worst_tasks([*before, *rows])
            }
            save(content | {"worst": worst, "rows": rows})


def open_questions(
    plan: EvaluationPlan, data: str, tasks: dict[str, Task]
) -> dict[str, Callable[[], Iterator[Question]]]:
    """For each task what begins to ask its questions of a text.

    Args:
        plan: its model's tokens, its column, its batch sizes.
        data: the text.
        tasks: by name.

    Raises:
        DataError: the text cannot be read, or has too few questions for a batch.
    """
    tokenizer = load_tokenizer(plan.model, plan.revision)
    documents = read_documents(data, plan.text_column, tokenizer)
    asked: dict[str, Callable[[], Iterator[Question]]] = {
        name: partial(task.ask, task, documents, tokenizer) for name, task in tasks.items()
    }
    for name, ask in asked.items():
        _check_enough(name, ask(), max(plan.batches), data)
    return asked


def answered(
    name: str,
    measurement: Measurement,
    questions: Iterator[Question],
    settings: list[Keys],
    wanted: TaskPlan,
    console: Console | None,
    title: str,
) -> Rows:
    """A row for each setting, all of them asked the same questions of the task."""
    policies = [measurement.evaluator.bind(keys) for keys in settings]
    found = measurement.run(questions, policies, wanted, console, title)
    return [
        row_of(name, keys, measurement.batch, of_setting, wanted.half_width)
        for keys, of_setting in zip(settings, found, strict=True)
    ]


def check_says_something(rows: Rows) -> None:
    """Refuse a task of which the exact model has nothing right.

    Raises:
        SereError: names it.
    """
    if rows and all(row["relative_loss"] is None for row in rows):
        raise SereError(
            f"--tasks {rows[0]['task']}: the exact model has none of {rows[0]['items']} right, so "
            "it says nothing; leave it out"
        )


def _check_enough(name: str, questions: Iterator[Question], batch: int, data: str) -> None:
    found = sum(1 for _ in islice(questions, batch))
    if found < batch:
        raise DataError(
            f"--tasks {name}: data = {data!r} gives {found} questions, texts of "
            f"{TASKS[name].length} tokens, but a batch takes {batch}; {TASKS[name].remedy}"
        )


def _content(evaluator: Evaluator, wanted: TaskPlan) -> dict[str, Any]:
    metadata = evaluator.artifact.metadata
    return {
        "model": model_name(evaluator.plan.model),
        "data": Path(evaluator.plan.data).name,
        "similarity": f"{metadata.metric}, of {metadata.tokens} tokens",
        "num_experts": evaluator.shape.num_experts,
        "top_k": evaluator.shape.top_k,
        "dtype": str(evaluator.model.dtype).removeprefix("torch."),
        "half_width": wanted.half_width,
    }


def _rows_of(old: dict[str, Any] | None, content: dict[str, Any]) -> Rows:
    """The rows of an earlier result of the same measurement.

    Raises:
        SereError: it is of another one; names what differs.
    """
    if old is None:
        return []
    for name in IDENTITY:
        if old.get(name) != content[name]:
            raise SereError(
                f"--append: the file's {name} is {old.get(name)!r}, this run's is "
                f"{content[name]!r}; write another file"
            )
    return list(old["rows"])
