"""One task at one batch size: questions are asked of the exact model and under every policy."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
import torch
from rich.console import Console

from sere_ray.evaluation.decode_batches import Predictions
from sere_ray.evaluation.evaluator import Evaluator
from sere_ray.evaluation.paired import Bools, Paired
from sere_ray.evaluation.task_items import Question, Task
from sere_ray.policy.bound import BoundPolicy
from sere_ray.util.errors import SereError
from sere_ray.util.progress import progress

Ended = Literal["half_width", "most_items", "text", "most_loss"]
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
    most_loss: float | None = None
    """A relative loss: settings that surely lose more are asked no further."""

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
class Found:
    """What one setting answered so far, pass by pass."""

    parts: list[Paired] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    """Mean distinct experts per layer and step."""
    rows_shares: list[float] = field(default_factory=list)
    """Share of slots that an expert computes."""
    ended_by: Ended = "most_items"
    """Why there are no more items: the interval is narrow enough, that many were asked, the text
    has no more, or too much is lost."""


class Measurement:
    """One task at one batch size."""

    def __init__(self, evaluator: Evaluator, task: Task, batch: int) -> None:
        self.evaluator, self.task, self.batch = evaluator, task, batch
        at_once = evaluator.texts_at_once(task.decode_tokens)
        self.size = batch * max(1, at_once // (batch * task.choices))
        """Questions of a pass."""

    def run(
        self,
        questions: Iterator[Question],
        policies: list[BoundPolicy],
        wanted: TaskPlan,
        console: Console | None,
        title: str,
    ) -> list[Found]:
        """Answers under every policy, until they are enough or there are no more questions."""
        found = [Found() for _ in policies]
        items = 0
        with progress(console, wanted.most_items, task=title, unit="items at most") as advance:
            while items < wanted.most_items:
                part = list(islice(questions, self.size))
                part = part[: len(part) // self.batch * self.batch]
                if not part:
                    _end(found, "text")
                    break
                self._ask(part, policies, found)
                new = len(found[0].parts[-1].exact)
                advance(min(new, wanted.most_items - items))
                items += new
                if ended := _enough(found, wanted):
                    _end(found, ended)
                    break
        return found

    def _ask(self, part: list[Question], policies: list[BoundPolicy], found: list[Found]) -> None:
        order = asking_order(len(part), self.task.choices)
        ids = torch.tensor([part[question].texts[choice] for question, choice in order])
        batches = self.evaluator.batches(ids, self.task.prompt_tokens)
        exact = judge(self.task, part, order, batches.predictions(None, self.batch))
        texts = np.repeat(np.arange(len(part)), [len(question.answers) for question in part])
        for policy, of_policy in zip(policies, found, strict=True):
            said = batches.predictions(policy, self.batch)
            of_policy.parts.append(Paired(exact, judge(self.task, part, order, said), texts))
            of_policy.reads.append(said.reads)
            of_policy.rows_shares.append(said.rows_share)


def _enough(found: list[Found], wanted: TaskPlan) -> Ended | None:
    losses = [Paired.join(of.parts).relative_loss() for of in found]
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        return None
    if all(loss.high - loss.low <= 2 * wanted.half_width for loss in known):
        return "half_width"
    most = wanted.most_loss
    return "most_loss" if most is not None and all(loss.low > most for loss in known) else None


def _end(found: list[Found], ended_by: Ended) -> None:
    for of_policy in found:
        of_policy.ended_by = ended_by


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


def judge(
    task: Task, part: list[Question], order: list[tuple[int, int]], said: Predictions
) -> Bools:
    """``[items]`` whether each is right, question by question.

    Args:
        task: what the questions are of.
        part: the questions of a pass.
        order: which (question, choice) each of the N rows is.
        said: of these rows.
    """
    first = task.prompt_tokens + 1  # token that the first scored row predicts
    row_of = {place: row for row, place in enumerate(order)}
    right: list[bool] = []
    for number, question in enumerate(part):
        spans = [slice(start - first, end - first) for start, end in question.answers]
        rows = [row_of[number, choice] for choice in range(task.choices)]
        if task.choices == 1:
            right += [bool(said.hits[rows[0], span].all()) for span in spans]
        else:
            likely = [said.log_p[row, spans[0]].sum(dtype=np.float64) for row in rows]
            right.append(all(likely[0] > other for other in likely[1:]))
    return np.array(right, dtype=np.bool_)
