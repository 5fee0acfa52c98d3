"""Tasks decide for ``sere-ray tune``: how many right answers a setting may lose, KL being a gate.

KL is quick to measure and says how much changes, not whether for the worse. So settings are
searched by KL, and what passes the gate is asked tasks; where they lose too much, the gate closes.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from sere_ray.evaluation.budget import Candidate, Text
from sere_ray.evaluation.evaluator import Evaluator
from sere_ray.evaluation.search import best_setting
from sere_ray.evaluation.task_items import TASKS, check_tasks
from sere_ray.evaluation.task_rows import Keys, Rows, loss_end
from sere_ray.evaluation.task_run import Measurement, TaskPlan
from sere_ray.evaluation.tasks import answered, check_says_something, open_questions
from sere_ray.util.errors import SereError

GATE = 0.1
"""Mean KL in nats that the search starts at where tasks decide and no gate is given."""
_CLOSED = 64.0
"""The gate is closed to less than this part of it."""
_BISECTIONS = 4
"""So the gate is found within a factor of 1.3."""


@dataclass(frozen=True)
class TaskBudget:
    """What right answers a setting may cost."""

    max_loss: float
    """Of every task's relative loss the end of the interval, 0..1."""
    tasks: tuple[str, ...]
    most_items: int = 20_000

    def check(self) -> None:
        """Refuse a task that is none, or a loss that cannot be kept.

        Raises:
            SereError: names the option.
        """
        check_tasks(self.tasks)
        if not 0.001 <= self.max_loss < 1:
            raise SereError(
                f"--max-task-loss = {self.max_loss:g}: must be at least 0.1% and below 100%"
            )

    @property
    def plan(self) -> TaskPlan:
        """How many items: until the interval is half as wide as what may be lost, to each side."""
        return TaskPlan(self.tasks, self.max_loss / 2, self.most_items, self.max_loss)


class TaskText:
    """One text, of which settings are asked tasks.

    Args:
        evaluator: the model.
        data: the text.
        budget: which tasks.
        seed: of the questions; with another one generated sums are others, too.
        tell: takes a line on each setting that was asked.

    Raises:
        SereError: the text has too few questions for a batch.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        data: str,
        budget: TaskBudget,
        seed: int,
        tell: Callable[[str], None],
    ) -> None:
        self.tasks = {name: replace(TASKS[name], seed=seed) for name in budget.tasks}
        self.asked = open_questions(evaluator.plan, data, self.tasks)
        self.evaluator, self.budget, self.tell = evaluator, budget, tell
        self.known: dict[str, dict[str, Any]] = {}
        self.verdicts: dict[str, bool] = {}
        self.nearest: dict[str, Any] | None = None
        """Of the rows that lose too much the one that loses least."""

    def row(self, task: str, keys: Keys, batch: int) -> dict[str, Any]:
        """What a setting does in a task; what was asked before is remembered.

        Raises:
            SereError: the exact model has none right.
        """
        name = json.dumps([task, keys, batch], sort_keys=True)
        if name not in self.known:
            measurement = Measurement(self.evaluator, self.tasks[task], batch)
            questions, plan = self.asked[task](), self.budget.plan
            rows = answered(task, measurement, questions, [keys], plan, None, task)
            check_says_something(rows)
            (self.known[name],) = rows
        return self.known[name]

    def rows(self, keys: Keys, batches: Sequence[int]) -> Rows:
        """Every task at batch sizes."""
        return [self.row(task, keys, batch) for batch in batches for task in self.tasks]

    def keeps(self, keys: Keys, batches: Sequence[int], name: str) -> bool:
        """Whether no task may lose more than the budget; the first that may is the last asked.

        Args:
            keys: of a setting.
            batches: sizes.
            name: of the setting, to be told.
        """
        of = json.dumps([keys, list(batches)], sort_keys=True)
        if of not in self.verdicts:
            self.verdicts[of] = self._keeps(keys, batches, name)
        return self.verdicts[of]

    def _keeps(self, keys: Keys, batches: Sequence[int], name: str) -> bool:
        for batch in batches:
            for task in self.tasks:
                row = self.row(task, keys, batch)
                if loss_end(row) > self.budget.max_loss:
                    if self.nearest is None or loss_end(row) < loss_end(self.nearest):
                        self.nearest = row
                    self.tell(f"{name}: {described(row)}: too much")
                    return False
        self.tell(f"{name}: keeps the budget of tasks")
        return True

    def why_none(self) -> str:
        """What stood in the way, for a message."""
        if self.nearest is None:
            return ""
        row, said = self.nearest, f"; nearest: {described(self.nearest)}"
        if row["items_needed"] <= row["items"] or row["ended_by"] == "most_loss":
            return said
        return (
            f"{said}; an interval of +-{self.budget.max_loss / 2:.2%} takes some "
            f"{row['items_needed']:,} items: give "
            + ("longer text" if row["ended_by"] == "text" else "a higher --most-items")
        )


def described(row: dict[str, Any]) -> str:
    """A row as words of a line."""
    low, high = row["relative_loss_95"]
    return (
        f"{row['task']} at {row['batch']} rows loses {row['relative_loss']:.1%} "
        f"({low:.1%}..{high:.1%}, {row['items']:,} items)"
    )


def best_by_tasks(
    text: Text, tasks: TaskText, rule: str, batches: tuple[int, ...]
) -> Candidate | None:
    """The strongest setting of a rule that tasks let pass; None where none does.

    Args:
        text: on which settings are searched by KL; its budget is the gate.
        tasks: what passes the gate is asked.
        rule: its name.
        batches: sizes that must keep both.
    """

    def passing(closed: float) -> Candidate | None:
        gate = text.budget.tightened(_CLOSED**-closed)

        def attempt(keys: Keys) -> Candidate:
            return text.attempt(keys, batches, gate)

        found = best_setting(attempt, rule, text.routing)
        if found is None:
            return None
        name = f"{rule}, {found.reads:.1f} experts, KL {math.exp(found.log_kl):.4f}"
        return found if tasks.keeps(found.keys, batches, name) else None

    best, low, high = passing(0.0), 0.0, 1.0
    for _ in range(0 if best else _BISECTIONS):
        middle = (low + high) / 2
        found = passing(middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def teller(console: Console) -> Callable[[str], None]:
    """Prints lines as they are."""
    return lambda line: console.print(f"   {line}", highlight=False, markup=False)
