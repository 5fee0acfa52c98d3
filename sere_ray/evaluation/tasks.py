"""``sere-ray tasks``: what a policy answers wrongly that the exact model has right, item by item.

Texts go through the model as in ``sere-ray evaluate``: B rows advance together, prompts are exact,
and every scored token is predicted by a decode row. Questions are asked until the interval of every
setting's relative loss is as narrow as wanted, or there are no more.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from sere_ray.calibration.loading import load_tokenizer, model_name
from sere_ray.evaluation.decode_batches import Answers
from sere_ray.evaluation.evaluator import EvaluationPlan, Evaluator
from sere_ray.evaluation.paired import Bools, Paired, mcnemar_p
from sere_ray.evaluation.settings import Setting, label, looks_at_ranks
from sere_ray.evaluation.task_items import TASKS, Question, Task
from sere_ray.evaluation.task_texts import read_documents
from sere_ray.util.errors import DataError, SereError
from sere_ray.util.progress import progress

Keys = dict[str, Any]
Rows = list[dict[str, Any]]
IDENTITY = ("model", "data", "similarity", "dtype", "half_width")
"""What the rows of one result file have in common."""
_HALF_WIDTH = 0.0001
"""The least that is taken: below it a task would never end."""


@dataclass(frozen=True)
class TaskPlan:
    """Which tasks, and how many items."""

    tasks: tuple[str, ...]
    half_width: float = 0.005
    """Wanted: half of the width of the 95 % interval of every relative loss."""
    most_items: int = 20_000
    """Of a task, however wide the interval is then; the pass that reaches it counts whole."""

    def check(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            SereError: names the number.
        """
        if not _HALF_WIDTH <= self.half_width < 1:
            raise SereError(
                f"--half-width = {self.half_width}: must be at least {_HALF_WIDTH} and below 1; "
                "0.005 is half a percent of what the exact model has right"
            )


@dataclass
class _Found:
    """What one setting answered so far."""

    parts: list[Paired] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)


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
    evaluator = Evaluator(plan, tuple(dict.fromkeys(keys["rule"] for keys in settings)))
    policies = [evaluator.bind(keys) for keys in settings]
    tokenizer = load_tokenizer(plan.model, plan.revision)
    documents = read_documents(plan.data, plan.text_column, tokenizer)
    content = _content(evaluator, wanted)
    before: Rows = _rows_of(old, content)
    rows: Rows = []
    for name in wanted.tasks:
        for batch in plan.batches:
            known = [row for row in before if (row["task"], row["batch"]) == (name, batch)]
            todo = [i for i, keys in enumerate(settings) if not _is_in(known, keys)]
            if not todo:
                continue
            measurement = _Measurement(evaluator, TASKS[name], batch)
            questions = TASKS[name].ask(TASKS[name], documents, tokenizer)
            found = measurement.run(
                questions, [policies[i] for i in todo], wanted, console, f"{name}, batch {batch}"
            )
            for i, of_setting in zip(todo, found, strict=True):
                rows.append(_row(name, settings[i], batch, of_setting, wanted.half_width))
            save(content | {"rows": rows})


class _Measurement:
    """One task at one batch size."""

    def __init__(self, evaluator: Evaluator, task: Task, batch: int) -> None:
        self.evaluator, self.task, self.batch = evaluator, task, batch
        at_once = evaluator.texts_at_once(task.decode_tokens)
        self.size = batch * max(1, at_once // (batch * task.choices))
        """Questions of a pass."""

    def run(
        self,
        questions: Iterator[Question],
        policies: list[Any],
        wanted: TaskPlan,
        console: Console | None,
        title: str,
    ) -> list[_Found]:
        """Answers under every policy, until they are enough or there are no more questions."""
        found = [_Found() for _ in policies]
        items = 0
        with progress(console, wanted.most_items, task=title, unit="items at most") as advance:
            while items < wanted.most_items:
                part = list(islice(questions, self.size))
                part = part[: len(part) // self.batch * self.batch]
                if not part:
                    break
                self._ask(part, policies, found)
                new = len(found[0].parts[-1].exact)
                advance(min(new, wanted.most_items - items))
                items += new
                if self._enough(found, wanted.half_width):
                    break
        if not items:
            raise DataError(
                f"data = {self.evaluator.plan.data!r}: gives fewer than {self.batch} questions of "
                f"{title.partition(',')[0]}, texts of {self.task.length} tokens; give more or "
                "longer text, or a smaller batch"
            )
        return found

    def _ask(self, part: list[Question], policies: list[Any], found: list[_Found]) -> None:
        order = asking_order(len(part), self.task.choices)
        ids = torch.tensor([part[question].texts[choice] for question, choice in order])
        batches = self.evaluator.batches(ids, self.task.prompt_tokens)
        exact = self._judge(part, order, batches.answers(None, self.batch))
        texts = np.repeat(np.arange(len(part)), [len(question.answers) for question in part])
        for policy, of_policy in zip(policies, found, strict=True):
            answers = batches.answers(policy, self.batch)
            of_policy.parts.append(Paired(exact, self._judge(part, order, answers), texts))
            of_policy.reads.append(answers.reads)

    def _judge(self, part: list[Question], order: list[tuple[int, int]], answers: Answers) -> Bools:
        """``[items]`` whether each is right, question by question."""
        first = self.task.prompt_tokens + 1  # token that the first scored row predicts
        row_of = {place: row for row, place in enumerate(order)}
        right: list[bool] = []
        for number, question in enumerate(part):
            spans = [slice(start - first, end - first) for start, end in question.answers]
            rows = [row_of[number, choice] for choice in range(self.task.choices)]
            if self.task.choices == 1:
                right += [bool(answers.hits[rows[0], span].all()) for span in spans]
            else:
                likely = [answers.log_p[row, spans[0]].sum(dtype=np.float64) for row in rows]
                right.append(all(likely[0] > other for other in likely[1:]))
        return np.array(right, dtype=np.bool_)

    @staticmethod
    def _enough(found: list[_Found], half_width: float) -> bool:
        return all(Paired.join(of.parts).half_width() <= half_width for of in found)


def asking_order(questions: int, choices: int) -> list[tuple[int, int]]:
    """Which (question, choice) each row of a pass is.

    The choices of a question are far apart, so that a batch has as many different prompts as rows,
    and true and false ones among them, as a server's has.
    """
    return [
        (question, (question + turn) % choices)
        for turn in range(choices)
        for question in range(questions)
    ]


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


def _named(keys: Keys) -> Keys:
    """Rule and settings as a row has them."""
    shown = {key: value for key, value in keys.items() if key != "rule" and value is not None}
    return {"rule": keys["rule"], "settings": shown}


def _is_in(rows: Rows, keys: Keys) -> bool:
    return any(_named(keys).items() <= row.items() for row in rows)


def _row(task: str, keys: Keys, batch: int, found: _Found, half_width: float) -> dict[str, Any]:
    paired = Paired.join(found.parts)
    loss = paired.relative_loss()
    none = {"relative_loss": None, "relative_loss_95": None}
    return {
        "task": task,
        **_named(keys),
        "batch": batch,
        "items": len(paired.exact),
        "right": int(paired.rule.sum()),
        "right_exact": int(paired.exact.sum()),
        "lost": paired.lost,
        "won": paired.won,
        **(loss.fields("relative_loss", 5) if loss else none),
        "mcnemar_p": float(f"{mcnemar_p(paired.lost, paired.won):.4g}"),
        "items_needed": paired.items_needed(half_width),
        "experts_read_mean": round(float(np.mean(found.reads)), 3),
    }
