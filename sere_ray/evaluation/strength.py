"""``sere-ray strength``: what `loss` means on a model, measured and kept in its artifact.

A tau means something else on every model: gates differ in how far they prefer their choices. So a
rule is run with its defaults at some taus, laid out over experts read, and numbers of rows, and
KL of the rows that answer a task is measured at each. At the middle number of rows some taus are
asked many items. What the task loses is a power of that KL, whatever the number of rows
(:mod:`sere_ray.evaluation.strength_law`); so tau, by way of KL, says what the worst task loses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from sere_ray.artifact.strength import Strength, StrengthCurve
from sere_ray.evaluation.decode_batches import DecodeBatches
from sere_ray.evaluation.evaluator import EvaluationPlan, Evaluator
from sere_ray.evaluation.grids import Routing
from sere_ray.evaluation.strength_answers import AskedTask, Asking, ask_in_turns
from sere_ray.evaluation.strength_law import LEAST_KL, PowerLaw, fit, nothing_stands_out
from sere_ray.evaluation.task_items import TASKS, Task
from sere_ray.evaluation.task_rows import Rows
from sere_ray.evaluation.tasks import open_questions
from sere_ray.rules.demand import DEMAND_RULES
from sere_ray.util.errors import SereError
from sere_ray.util.progress import progress

_PLACES = (0.97, 0.85, 0.7, 0.55, 0.4, 0.25, 0.12, 0.03)
"""Taus, from light to strong, by what they read: 0 = first choices alone, 1 = all choices. None is
at 0, since from some tau on nothing changes any more, and taus between it and the next would be
taken for what they are not."""
_TO_THE_END = slice(3, None, 2)
"""Which of them are asked many items."""
_SEED = 2
"""Of the questions: others than `tasks`, `tune` and `advise` ask, which may judge what is found."""


@dataclass(frozen=True)
class StrengthPlan:
    """What to measure."""

    rules: tuple[str, ...]
    tasks: tuple[str, ...] | None
    """None = all that the text and the model allow."""
    precision: float = 0.15
    """Half of the width of the interval of what the strongest setting loses, in parts of that."""
    most_items: int = 4000
    """Of a task, however wide the interval is then."""


class Point(NamedTuple):
    """A tau at a number of rows."""

    rows: int
    tau: float
    most: tuple[int, ...]
    """By layer: the most demand that a step gave up."""


def measure_strength(
    plan: EvaluationPlan, wanted: StrengthPlan, console: Console
) -> tuple[dict[str, Strength], list[dict[str, Any]]]:
    """What `loss` means under each rule, and what was measured for it.

    Args:
        plan: the model, its artifact, the text, and as batch sizes the numbers of rows.
        wanted: rules and tasks.
        console: where progress goes.

    Returns:
        By rule, for the artifact; and a row for each rule, task, number of rows and tau.

    Raises:
        SereError: something cannot be used, or nothing was lost that could be measured.
    """
    for rule in wanted.rules:
        if rule not in DEMAND_RULES:
            raise SereError(f"--rules: {rule!r} has no tau; name {' or '.join(DEMAND_RULES)}")
    evaluator = Evaluator(plan, wanted.rules)
    chunks = list(evaluator.chunks(evaluator.input_ids, max(plan.batches)))
    routing = Routing(chunks[0], evaluator.bind)
    questions = _open(evaluator, wanted, console)
    strengths, rows = {}, []
    for rule in wanted.rules:
        points = _points(evaluator, chunks, routing, rule, console)
        settings = [Asking({"rule": rule, "tau": point.tau}, point.rows) for point in points]
        middle = [asking for asking in settings if asking.batch == _middle(plan.batches)]
        asked = [
            AskedTask(evaluator, name, _task(name), ask(), settings, middle[_TO_THE_END])
            for name, ask in questions.items()
        ]
        ask_in_turns(asked, wanted.precision, wanted.most_items, console, f"{rule}: tasks")
        of_rule = [row for task in asked for row in task.rows()]
        laws = fit([row for row in of_rule if row["to_the_end"]])
        if not laws:
            raise SereError(nothing_stands_out(rule))
        strengths[rule] = Strength(
            curves=_curves(points, of_rule, laws),
            tasks=tuple(laws),
            items=sum(task.items for task in asked),
            data=Path(plan.data).name,
        )
        rows += [{**row, "law": laws.get(row["task"])} for row in of_rule]
    return strengths, rows


def _open(
    evaluator: Evaluator, wanted: StrengthPlan, console: Console
) -> dict[str, Callable[[], Any]]:
    """The tasks that can be asked. Those that were named must be."""
    plan = evaluator.plan
    asked: dict[str, Callable[[], Any]] = {}
    for name in wanted.tasks or TASKS:
        try:
            asked |= open_questions(plan, plan.data, {name: _task(name)})
        except SereError as error:
            if wanted.tasks:
                raise
            console.print(f"without {name}: {error}", highlight=False, markup=False)
    return asked


def _middle(batches: Sequence[int]) -> int:
    return sorted(batches)[len(batches) // 2]


def _task(name: str) -> Task:
    return replace(TASKS[name], seed=_SEED)


def _points(
    evaluator: Evaluator,
    chunks: list[DecodeBatches],
    routing: Routing,
    rule: str,
    console: Console,
) -> list[Point]:
    """By number of rows, each from light to strong."""
    found: list[Point] = []
    batches = evaluator.plan.batches
    total = len(_PLACES) * len(batches)
    with progress(console, total, task=f"{rule}: demand", unit="taus") as advance:
        for batch in batches:
            for tau in sorted({_tau(routing, rule, batch, place) for place in _PLACES}):
                policy = evaluator.bind({"rule": rule, "tau": tau})
                most = np.max([chunk.most_given_up(policy, batch) for chunk in chunks], axis=0)
                found.append(Point(batch, tau, tuple(map(int, most))))
                advance(1)
    return found


def _tau(routing: Routing, rule: str, batch: int, place: float) -> float:
    first, every = (
        routing.reads({"rule": "topk", "select_top_k": size}, batch) for size in (1, routing.top_k)
    )
    keys = routing.at({"rule": rule}, "tau", first + (every - first) * place, batch)
    return float(keys["tau"])


def _curves(
    points: list[Point], rows: Rows, laws: dict[str, PowerLaw]
) -> tuple[StrengthCurve, ...]:
    """For each number of rows what the worst task loses at each tau."""
    curves = []
    for batch in dict.fromkeys(point.rows for point in points):
        of_batch = [point for point in points if point.rows == batch]
        losses = [_loss(point, rows, laws) for point in of_batch]
        curves.append(
            StrengthCurve(
                rows=batch,
                tau=tuple(point.tau for point in of_batch),
                loss=tuple(float(f"{loss:.4g}") for loss in np.maximum.accumulate(losses)),
                most=tuple(point.most for point in of_batch),
            )
        )
    return tuple(curves)


def _loss(point: Point, rows: Rows, laws: dict[str, PowerLaw]) -> float:
    """Of the worst task."""
    return max(
        laws[row["task"]].at(max(row["kl"], LEAST_KL))
        for row in rows
        if row["task"] in laws and (row["batch"], row["settings"]["tau"]) == (point.rows, point.tau)
    )


def described(strength: Strength, losses: Sequence[float]) -> list[str]:
    """Lines on what some losses are, for a terminal."""
    low, high = strength.range
    lines = [f"worst of {', '.join(strength.tasks)}; loss from {low:.2g} to {high:.2g}"]
    for loss in losses:
        if low <= loss <= high:
            taus = ", ".join(f"{s.tau:g} up to {s.up_to}" for s in strength.stages(loss))
            lines.append(f"loss {loss:g}: tau by rows {taus}")
    return lines
