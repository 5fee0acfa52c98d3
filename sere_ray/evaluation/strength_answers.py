"""A task's answers under several taus and numbers of rows, on the same questions.

A pass of questions goes through the exact model once and through every setting, so that settings
differ in nothing else. KL of the answers is known after some hundred items, and those are asked of
all settings; what is lost takes thousands, which only some settings are asked. Tasks take turns,
and one ends when it is known well enough, or surely does not lose the most.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console

from sere_ray.evaluation.evaluator import Evaluator
from sere_ray.evaluation.layer_rule import Floats
from sere_ray.evaluation.paired import Paired
from sere_ray.evaluation.task_items import Question, Task
from sere_ray.evaluation.task_rows import Keys, Rows, counted_fields, named
from sere_ray.evaluation.task_run import Measurement, asking_order, judge
from sere_ray.util.progress import progress

_EVERYWHERE = 400
"""Items, or texts, that all settings are asked."""


class Asking(NamedTuple):
    """A setting at a number of rows."""

    keys: Keys
    batch: int


class Loss(NamedTuple):
    """A relative loss and its 95 % interval by the normal law.

    The bootstrap of a result's rows is too slow to be taken for every setting after each pass.
    """

    value: float
    low: float
    high: float


@dataclass
class Answers:
    """What a setting answered so far, pass by pass."""

    asking: Asking
    parts: list[Paired] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    """By pass that all settings were asked: the mean over the rows that give answers, nats."""
    reads: list[float] = field(default_factory=list)
    """By pass: mean distinct experts per layer and step."""

    def loss(self) -> Loss:
        """What is lost; anything may be where the exact model has nothing right."""
        right = sum(int(part.exact.sum()) for part in self.parts)
        if not right:
            return Loss(0.0, -1.0, 1.0)
        lost, won = (sum(getattr(part, name) for part in self.parts) for name in ("lost", "won"))
        value, half = (lost - won) / right, 1.96 * (lost + won + 1) ** 0.5 / right
        return Loss(value, value - half, value + half)


class AskedTask:
    """A task, and what all settings answered.

    Args:
        evaluator: the model.
        name: of the task.
        task: what its texts are like.
        questions: of the task.
        settings: what is asked.
        to_the_end: which of them are asked all items.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        name: str,
        task: Task,
        questions: Iterator[Question],
        settings: list[Asking],
        to_the_end: list[Asking],
    ) -> None:
        self.evaluator, self.name, self.task = evaluator, name, task
        self._questions = questions
        self._largest = max(asking.batch for asking in settings)
        self._size = Measurement(evaluator, task, self._largest).size
        self.answers = [Answers(asking) for asking in settings]
        self.to_the_end = [a for a in self.answers if a.asking in to_the_end]
        self.items = self.texts = 0
        self.ended_by: str | None = None

    def ask(self) -> None:
        """Ask one pass more; without another one the task has ended."""
        part = list(islice(self._questions, self._size))
        part = part[: len(part) // self._largest * self._largest]
        if not part:
            self.ended_by = "text"
            return
        order = asking_order(len(part), self.task.choices)
        ids = torch.tensor([part[question].texts[choice] for question, choice in order])
        batches = self.evaluator.batches(ids, self.task.prompt_tokens)
        exact = judge(self.task, part, order, batches.predictions(None, self._largest))
        texts = np.repeat(np.arange(len(part)), [len(question.answers) for question in part])
        everywhere = self.is_new
        for answers in self.answers if everywhere else self.to_the_end:
            policy = self.evaluator.bind(answers.asking.keys)
            said, kl = batches.predictions_with_kl(policy, answers.asking.batch)
            answers.parts.append(Paired(exact, judge(self.task, part, order, said), texts))
            answers.reads.append(said.reads)
            if everywhere:
                answers.kl.append(_of_answers(self.task, part, order, kl))
        self.items += len(exact)
        self.texts += len(order)

    @property
    def is_new(self) -> bool:
        """Whether all settings are asked yet."""
        return max(self.items, self.texts) < _EVERYWHERE

    def strongest(self) -> Loss:
        """Of the setting that loses most, of those that are asked to the end."""
        return max(answers.loss() for answers in self.to_the_end)

    def rows(self) -> Rows:
        """A row of a result for each setting."""
        return [
            {
                "task": self.name,
                **named(answers.asking.keys),
                "batch": answers.asking.batch,
                **counted_fields(Paired.join(answers.parts)),
                "ended_by": self.ended_by,
                "to_the_end": answers in self.to_the_end,
                "experts_read_mean": round(float(np.mean(answers.reads)), 3),
                "kl": float(f"{np.mean(answers.kl):.4g}"),
            }
            for answers in self.answers
            if answers.parts
        ]


def ask_in_turns(
    tasks: list[AskedTask], precision: float, most_items: int, console: Console | None, title: str
) -> None:
    """Ask until each task is known well enough, or surely loses less than the worst.

    Args:
        tasks: what to ask.
        precision: half of the width of the strongest setting's interval, in parts of its loss.
        most_items: of a task, however well it is known then.
        console: where progress goes; None = nowhere.
        title: of the work.
    """
    going = list(tasks)
    with progress(console, most_items * len(tasks), task=title, unit="items at most") as advance:
        while going:
            task = min(going, key=lambda task: task.texts)
            before = task.items
            task.ask()
            advance(task.items - before)
            worst = max(tasks, key=lambda task: task.strongest().low)
            for task in going:
                task.ended_by = task.ended_by or _enough(task, worst, precision, most_items)
            going = [task for task in going if task.ended_by is None]


def _enough(task: AskedTask, worst: AskedTask, precision: float, most_items: int) -> str | None:
    """Why a task is asked no further. A task that is left keeps the law that it has.

    Once the worst is known, it is enough that another one seems to lose less.
    """
    loss, most = task.strongest(), worst.strongest()
    if task.items >= most_items:
        return "most_items"
    if task.is_new:
        return None
    if loss.high < most.low or (worst.ended_by and loss.value < most.value):
        return "not_worst"
    return "precision" if loss.high - loss.value < precision * loss.value else None


def _of_answers(
    task: Task, part: list[Question], order: list[tuple[int, int]], kl: Floats
) -> float:
    """The mean over items of the mean over the rows that give an item's answer.

    Args:
        task: what the questions are of.
        part: the questions of a pass.
        order: which (question, choice) each of the N rows is.
        kl: ``[N, D - 1]``.
    """
    first = task.prompt_tokens + 1  # token that the first scored row predicts
    return float(
        np.mean(
            [
                kl[row, start - first : end - first].mean(dtype=np.float64)
                for row, (question, _) in enumerate(order)
                for start, end in part[question].answers
            ]
        )
    )
