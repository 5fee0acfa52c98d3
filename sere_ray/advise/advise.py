"""`sere-ray advise`: calibrate, compare, ask tasks, choose, check on a second text, say so.

Settings of the rules that engines serve are laid out from strong to light. Those that no other one
beats in experts read and KL are asked tasks on the first text, all of them the same items; one that
surely loses more than any loss of interest is asked no further. For each loss the setting is chosen
that reads the fewest experts and whose worst task keeps it, interval and all. The chosen ones are
asked again on the second text, which had no part in the choice.
"""

import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from sere_ray.advise.plan import NOTHING, AdvicePlan, Folder
from sere_ray.advise.step_curve import StepCurve, read_curve
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.calibration.data import open_texts
from sere_ray.calibration.loading import load_tokenizer, model_name
from sere_ray.calibration.run import calibrate
from sere_ray.evaluation.budget import Budget, Text
from sere_ray.evaluation.evaluator import EvaluationPlan, Evaluator
from sere_ray.evaluation.grids import STRENGTH, Keys, Routing, listed, sweep, with_servers_floor
from sere_ray.evaluation.settings import rules_of
from sere_ray.evaluation.task_items import TASKS
from sere_ray.evaluation.task_rows import Rows, loss_end, named, worst_tasks
from sere_ray.evaluation.task_run import Measurement, TaskPlan
from sere_ray.evaluation.tasks import answered, check_says_something, open_questions
from sere_ray.util.progress import progress

LENGTH, PROMPT = 128, 64
_PILOT = 8
"""Settings are first asked this part of the items."""
_MOST_ASKED = 6
"""Settings that are asked tasks: the strongest that is worth it to the lightest."""


def advise(plan: AdvicePlan, out: Path, console: Console) -> dict[str, Any]:
    """The content of `advise.json`; the artifact and finished steps are in the folder.

    Args:
        plan: the question.
        out: the folder.
        console: where progress goes.

    Raises:
        SereError: something cannot be used; says what to do.
    """
    plan.check_values()
    curve = read_curve(plan.step_times, plan.batch) if plan.step_times else None
    folder = Folder(out, plan)
    _say(console, 1, "calibrate: which experts stand in for which")
    windows = {"windows": plan.calibration_sequences}
    if not folder.artifact.exists():
        folder.forget("calibrated")
    folder.step("calibrated", windows, lambda: _calibrate(folder, console))
    advisor = _Advisor(folder, console)
    _say(console, 2, "compare settings by the experts they read and KL")
    settings = folder.step("compared", advisor.depends, advisor.compare)
    _say(console, 3, "ask tasks on the first text")
    asked = advisor.ask("choose", settings)
    chosen = {loss: strongest(settings, asked, loss) for loss in plan.losses}
    again = list({str(row): row for row in chosen.values() if row}.values())
    _say(console, 4, "ask the chosen ones on the second text")
    checked = advisor.ask("check", again)
    return {
        "model": model_name(plan.model),
        "batch": plan.batch,
        "no_loss": NOTHING,
        "experts_exact": settings[0]["experts_exact"],
        "step_times": vars(curve) if curve else None,
        "rows": [_advice(loss, chosen[loss], settings, checked, curve) for loss in plan.losses],
        "compared": settings,
        "asked": asked,
        "checked": checked,
    }


def _say(console: Console, number: int, what: str) -> None:
    console.print(f"{number}/4 {what}", highlight=False)


def _calibrate(folder: Folder, console: Console) -> dict[str, int]:
    plan, data = folder.plan, str(folder.texts["choose"])
    tokenizer, windows = load_tokenizer(plan.model, None), 0
    for text in open_texts(data).texts:
        windows += len(tokenizer(text, verbose=False)["input_ids"]) // LENGTH
        if windows >= plan.calibration_sequences:
            break
    artifact = calibrate(
        plan.model,
        data=data,
        out=folder.artifact,
        sequences=max(min(windows, plan.calibration_sequences), 1),
        device=plan.device,
        statistics=("directed",),
        console=console,
    )
    return {"tokens": artifact.metadata.tokens}


class _Advisor:
    """A loaded model and what is measured of it; loaded when first needed."""

    def __init__(self, folder: Folder, console: Console) -> None:
        self.folder, self.plan, self.console = folder, folder.plan, console
        known = rules_of(SimilarityArtifact.load(folder.artifact))
        self.rules = [rule for rule in self.plan.rules if rule in known]
        self._evaluator: Evaluator | None = None

    @property
    def depends(self) -> dict[str, Any]:
        """What settings compared by KL depend on."""
        plan = self.plan
        return {
            "rules": self.rules,
            "batch": plan.batch,
            "sequences": plan.sequences,
            "windows": plan.calibration_sequences,
        }

    @property
    def evaluator(self) -> Evaluator:
        """The model and its artifact."""
        if self._evaluator is None:
            plan = self.plan
            self._evaluator = Evaluator(
                EvaluationPlan(
                    model=plan.model,
                    similarity=self.folder.artifact,
                    data=str(self.folder.texts["choose"]),
                    text_column="text",
                    sequences=plan.sequences,
                    length=LENGTH,
                    prompt_tokens=PROMPT,
                    batches=(plan.batch,),
                    ranks=(1,),
                    device=plan.device,
                ),
                tuple(self.rules),
            )
        return self._evaluator

    def compare(self) -> Rows:
        """Settings that no other beats, from strong to light, and what each reads."""
        text = Text(self.evaluator, self.evaluator.plan.data, Budget(1.0, None))
        tried = [keys for rule in self.rules for keys in _settings(rule, text.routing, self.plan)]
        rows = []
        with progress(self.console, len(tried), task="compare", unit="settings") as advance:
            for keys in tried:
                (row,) = text.report(text.measure(keys))
                rows.append({**named(keys), **row})
                advance(1)
        rows.sort(key=lambda row: (row["experts_read_mean"], row["kl_mean"]))
        best = [r for i, r in enumerate(rows) if all(r["kl_mean"] < o["kl_mean"] for o in rows[:i])]
        return _spread(best)

    def ask(self, text: str, settings: Rows) -> Rows:
        """Every task on a text, the same items of all settings; a finished task is not asked again.

        Args:
            text: ``choose`` or ``check``.
            settings: with rule and settings.
        """
        plan = self.plan
        all_keys = [{"rule": row["rule"], **row["settings"]} for row in settings]
        wanted = TaskPlan(plan.tasks, min(plan.losses) / 2, plan.most_items)
        rows: Rows = []
        for name in plan.tasks:
            left = self._left(all_keys, rows)
            depends = {**self.depends, "settings": left, "asked": asdict(wanted)}
            ask = partial(self._ask, name, text, left, wanted)
            rows += self.folder.step(f"{text}-{name}", depends, ask) if left else []
        return rows

    def _left(self, settings: list[Keys], rows: Rows) -> list[Keys]:
        """The settings without those that surely lose too much in one of the rows."""
        lost = [row for row in rows if self._is_lost(row)]
        return [keys for keys in settings if not any(_same(row, named(keys)) for row in lost)]

    def _is_lost(self, row: dict[str, Any]) -> bool:
        """Whether a setting surely loses more than may be lost."""
        return (
            row["relative_loss"] is not None and row["relative_loss_95"][0] > self.plan.losses[-1]
        )

    def _ask(self, name: str, text: str, all_keys: list[Keys], wanted: TaskPlan) -> Rows:
        # Generated sums are others on the second text.
        task = replace(TASKS[name], seed=int(text == "check"))
        (ask,) = open_questions(
            self.evaluator.plan, str(self.folder.texts[text]), {name: task}
        ).values()
        measurement = Measurement(self.evaluator, task, self.plan.batch)

        def answers(keys: list[Keys], plan: TaskPlan) -> Rows:
            return answered(name, measurement, ask(), keys, plan, self.console, name)

        pilot = answers(all_keys, replace(wanted, most_items=wanted.most_items // _PILOT))
        left = self._left(all_keys, pilot)
        rows = [row for row in pilot if self._is_lost(row)] + (
            answers(left, wanted) if left else []
        )
        check_says_something(rows)
        return rows


def _settings(rule: str, routing: Routing, plan: AdvicePlan) -> list[Keys]:
    """From strong to light, each with the floor that servers have."""
    if rule in STRENGTH:
        return sweep([{"rule": rule}], routing, plan.batch)
    return [
        keys
        for keys in with_servers_floor(listed(rule, routing.top_k))
        if keys.get("threshold") is None
    ]


def _spread(rows: Rows) -> Rows:
    """At most so many, evenly over the experts that they read."""
    if len(rows) <= _MOST_ASKED:
        return rows
    step = (len(rows) - 1) / (_MOST_ASKED - 1)
    return [rows[round(step * i)] for i in range(_MOST_ASKED)]


def strongest(compared: Rows, asked: Rows, loss: float) -> dict[str, Any] | None:
    """The worst task of the setting that reads the fewest experts and keeps the loss.

    Args:
        compared: settings, from few experts read to many.
        asked: what tasks said of them.
        loss: relative, 0..1.
    """
    worst = worst_tasks(asked, also=("items", "items_needed"))
    of_settings = (next(row for row in worst if _same(row, setting)) for setting in compared)
    return next((row for row in of_settings if loss_end(row) <= loss), None)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (one["rule"], one["settings"]) == (other["rule"], other["settings"])


def _agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two losses differ by no more than both intervals together allow."""
    halves = [(row["relative_loss_95"][1] - row["relative_loss_95"][0]) / 2 for row in (one, other)]
    return bool(abs(one["relative_loss"] - other["relative_loss"]) <= math.hypot(*halves))


def _advice(
    loss: float,
    chosen: dict[str, Any] | None,
    compared: Rows,
    checked: Rows,
    curve: StepCurve | None,
) -> dict[str, Any]:
    """A row of the advice: what a loss buys."""
    if chosen is None:
        return {"loss": loss, "rule": None, "settings": None}
    second = next(row for row in worst_tasks(checked) if _same(row, chosen))
    # Of another task where that one has lost too much already: then this one is not asked.
    same = next((r for r in checked if _same(r, chosen) and r["task"] == chosen["task"]), second)
    of_kl = next(row for row in compared if _same(row, chosen))
    share = of_kl["experts_to_exact"]
    low, high = chosen["relative_loss_95"]
    return {
        "loss": loss,
        "rule": chosen["rule"],
        "settings": chosen["settings"],
        "experts_read_mean": of_kl["experts_read_mean"],
        "experts_share": share,
        "kl_mean": of_kl["kl_mean"],
        "worst_task": chosen["task"],
        "task_loss": chosen["relative_loss"],
        "task_loss_95": chosen["relative_loss_95"],
        "checked_task": second["task"],
        "checked_loss": second["relative_loss"],
        "checked_loss_95": second["relative_loss_95"],
        "inside": same["relative_loss"] is not None and low <= same["relative_loss"] <= high,
        "agrees": same["relative_loss"] is not None and _agree(chosen, same),
        "step_speedup": round(curve.speedup(share), 3) if curve else None,
    }
