"""``sere-ray strength``: what `loss` means on a model, measured and kept in its artifact.

A tau means something else on every model: gates differ in how far they prefer their choices. So a
rule is run with its defaults at some taus, laid out over experts read, and numbers of rows, and KL
to the exact model is measured at each. The strongest taus are also asked tasks, at the middle
number of rows: a small loss takes very many items to see, a large one few. What a task loses is a
power of KL, taken to be the same at all numbers of rows (docs/quality.md says how far that holds).
The power is fitted, and so tau, by way of KL, says what the worst task loses.
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
from sere_ray.evaluation.grids import Keys, Routing
from sere_ray.evaluation.task_items import TASKS, Task
from sere_ray.evaluation.task_rows import Rows
from sere_ray.evaluation.task_run import Measurement, TaskPlan
from sere_ray.evaluation.tasks import answered, open_questions
from sere_ray.rules.demand import DEMAND_RULES
from sere_ray.util.errors import SereError
from sere_ray.util.progress import progress

_PLACES = (0.99, 0.95, 0.85, 0.7, 0.5, 0.25, 0.0)
"""Taus, from light to strong, by what they read: 0 = first choices alone, 1 = all choices."""
_ASKED = 3
"""The strongest of them are asked tasks."""
_LEAST_RIGHT = 100
"""Items that the exact model must have right for a task to say something."""
_POWERS = np.linspace(0.4, 1.0, 13)
"""Answers that flip both ways alike cost in proportion to KL; where nearly all are right, they flip
one way, in proportion to its root."""
_SEED = 2
"""Of the questions: others than `tasks`, `tune` and `advise` ask, which may judge what is found."""


@dataclass(frozen=True)
class StrengthPlan:
    """What to measure."""

    rules: tuple[str, ...]
    tasks: tuple[str, ...] | None
    """None = all that the text and the model allow."""
    half_width: float = 0.01
    """Of the interval of each relative loss; the fit is of three."""
    most_items: int = 5000
    """Of a task, at each tau, however wide the interval is then."""


class Point(NamedTuple):
    """A tau at a number of rows."""

    tau: float
    kl: float
    most: tuple[int, ...]
    """By layer: the most demand that a step gave up."""


class PowerLaw(NamedTuple):
    """What a task loses: ``factor x KL ^ power``."""

    factor: float
    power: float

    def at(self, kl: float) -> float:
        """The relative loss."""
        return float(min(self.factor * kl**self.power, 1.0))


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
    asked = _open(evaluator, wanted, console)
    strengths, rows = {}, []
    for rule in wanted.rules:
        points = _points(evaluator, chunks, routing, rule, console)
        middle = sorted(points)[len(points) // 2]
        of_tasks = _ask(evaluator, asked, rule, middle, points[middle], wanted, console)
        answers = [{**row, "kl": point.kl} for row, point in of_tasks]
        laws = fit(answers)
        if not laws:
            raise SereError(
                f"{rule}: no task lost anything that stands out; give a higher --most-items, or "
                f"more text; each must have {_LEAST_RIGHT} items right by the exact model"
            )
        items = sum(row["items"] for row in answers)
        strengths[rule] = _strength(points, laws, items, Path(plan.data).name)
        rows += [{**row, "law": laws.get(row["task"])} for row in answers]
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


def _task(name: str) -> Task:
    return replace(TASKS[name], seed=_SEED)


def _points(
    evaluator: Evaluator,
    chunks: list[DecodeBatches],
    routing: Routing,
    rule: str,
    console: Console,
) -> dict[int, list[Point]]:
    """By number of rows, from light to strong."""
    found: dict[int, list[Point]] = {}
    batches = evaluator.plan.batches
    with progress(console, len(_PLACES) * len(batches), task=f"{rule}: KL", unit="taus") as advance:
        for batch in batches:
            taus = {_tau(routing, rule, batch, place) for place in _PLACES}
            found[batch] = []
            for tau in sorted(taus):
                policy = evaluator.bind({"rule": rule, "tau": tau})
                parts = [chunk.strength(policy, batch) for chunk in chunks]
                kl = float(np.mean([part[0] for part in parts]))
                most = np.max([part[1] for part in parts], axis=0)
                found[batch].append(Point(tau, kl, tuple(map(int, most))))
                advance(1)
    return found


def _tau(routing: Routing, rule: str, batch: int, place: float) -> float:
    first, every = (
        routing.reads({"rule": "topk", "select_top_k": size}, batch) for size in (1, routing.top_k)
    )
    keys = routing.at({"rule": rule}, "tau", first + (every - first) * place, batch)
    return float(keys["tau"])


def _ask(
    evaluator: Evaluator,
    asked: dict[str, Callable[[], Any]],
    rule: str,
    batch: int,
    points: list[Point],
    wanted: StrengthPlan,
    console: Console,
) -> list[tuple[dict[str, Any], Point]]:
    """Each task's row at each of the strongest taus."""
    strongest, rows = points[-_ASKED:], []
    settings: list[Keys] = [{"rule": rule, "tau": point.tau} for point in strongest]
    plan = TaskPlan(tuple(asked), wanted.half_width, wanted.most_items)
    for name, ask in asked.items():
        measurement = Measurement(evaluator, _task(name), batch)
        title = f"{rule}: {name}, {batch} rows"
        of_task = answered(name, measurement, ask(), settings, plan, console, title)
        rows += list(zip(of_task, strongest, strict=True))
    return rows


def fit(rows: Rows) -> dict[str, PowerLaw]:
    """By task what it loses; without tasks that say nothing, or lose nothing.

    Args:
        rows: with ``task``, ``kl``, ``lost``, ``won``, ``right_exact``.
    """
    laws = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [r for r in rows if r["task"] == task and r["right_exact"] >= _LEAST_RIGHT]
        law = _fitted(of_task) if of_task else None
        if law is not None:
            laws[task] = law
    return laws


def _fitted(rows: Rows) -> PowerLaw | None:
    """Weighted least squares; a loss that does not stand out from its noise is none."""
    right = np.array([row["right_exact"] for row in rows], dtype=np.float64)
    loss = np.array([row["lost"] - row["won"] for row in rows]) / right
    noise = np.sqrt(np.array([row["lost"] + row["won"] for row in rows]) + 1) / right
    kl = np.array([max(row["kl"], 1e-9) for row in rows])
    best: tuple[float, PowerLaw] | None = None
    for power in _POWERS:
        x, y = kl**power / noise, loss / noise
        factor = float(x @ y / (x @ x))
        if factor * np.sqrt(x @ x) < 2:  # standard errors
            continue
        misfit = float(np.sum((y - factor * x) ** 2))
        if best is None or misfit < best[0]:
            best = misfit, PowerLaw(factor, float(power))
    return best[1] if best else None


def _strength(
    points: dict[int, list[Point]], laws: dict[str, PowerLaw], items: int, data: str
) -> Strength:
    curves = []
    for batch, of_batch in sorted(points.items()):
        kl = np.maximum.accumulate([max(point.kl, 1e-9) for point in of_batch])
        curves.append(
            StrengthCurve(
                rows=batch,
                tau=tuple(point.tau for point in of_batch),
                loss=tuple(_loss(laws, float(number)) for number in kl),
                most=tuple(point.most for point in of_batch),
            )
        )
    return Strength(curves=tuple(curves), tasks=tuple(laws), items=items, data=data)


def _loss(laws: dict[str, PowerLaw], kl: float) -> float:
    """Of the worst task, with digits that mean something."""
    return float(f"{max(law.at(kl) for law in laws.values()):.4g}")


def described(strength: Strength, losses: Sequence[float]) -> list[str]:
    """Lines on what some losses are, for a terminal."""
    low, high = strength.range
    lines = [f"worst of {', '.join(strength.tasks)}; loss from {low:.2g} to {high:.2g}"]
    for loss in losses:
        if low <= loss <= high:
            taus = ", ".join(f"{s.tau:g} up to {s.up_to}" for s in strength.stages(loss))
            lines.append(f"loss {loss:g}: tau by rows {taus}")
    return lines
