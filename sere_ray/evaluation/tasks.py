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
from transformers import PreTrainedTokenizerBase

from sere_ray.calibration.loading import load_tokenizer, model_name
from sere_ray.evaluation.evaluator import EvaluationPlan, Evaluator
from sere_ray.evaluation.settings import Setting, label, looks_at_ranks
from sere_ray.evaluation.task_items import TASKS, Question, Task
from sere_ray.evaluation.task_rows import Keys, Rows, is_in, row_of, worst_tasks
from sere_ray.evaluation.task_run import Measurement, TaskPlan
from sere_ray.evaluation.task_texts import Document, read_documents
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
    tokenizer = load_tokenizer(plan.model, plan.revision)
    documents = read_documents(plan.data, plan.text_column, tokenizer)
    tasks = {name: TASKS[name] for name in wanted.tasks}
    asked = questions_of(tasks, documents, tokenizer)
    for name, ask in asked.items():
        check_enough(name, ask(), max(plan.batches), plan.data)
    evaluator = Evaluator(plan, tuple(dict.fromkeys(keys["rule"] for keys in settings)))
    policies = [evaluator.bind(keys) for keys in settings]
    content = _content(evaluator, wanted)
    before: Rows = _rows_of(old, content)
    rows: Rows = []
    for name, ask in asked.items():
        for batch in plan.batches:
            known = [row for row in before if (row["task"], row["batch"]) == (name, batch)]
            todo = [i for i, keys in enumerate(settings) if not is_in(known, keys)]
            if not todo:
                continue
            measurement = Measurement(evaluator, TASKS[name], batch)
            of_todo = [policies[i] for i in todo]
            title = f"{name}, batch {batch}"
            found = measurement.run(ask(), of_todo, wanted, console, title)
            for i, of_setting in zip(todo, found, strict=True):
                rows.append(row_of(name, settings[i], batch, of_setting, wanted.half_width))
            worst = {
                f"{row['rule']} {label(row['settings'])}, batch {row['batch']}": row
                for row in worst_tasks([*before, *rows])
            }
            save(content | {"worst": worst, "rows": rows})


def questions_of(
    tasks: dict[str, Task], documents: list[Document], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Callable[[], Iterator[Question]]]:
    """For each task what begins to ask its questions of a text."""
    return {name: partial(task.ask, task, documents, tokenizer) for name, task in tasks.items()}


def check_enough(name: str, questions: Iterator[Question], batch: int, data: str) -> None:
    """Refuse a task that has no questions for one batch.

    Raises:
        DataError: says how many there are, and what to do.
    """
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
