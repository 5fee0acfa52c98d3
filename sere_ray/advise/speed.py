"""Speed at held quality: the fewest experts read at which tasks stay right, and the step time then.

Tasks say what a setting loses and how many experts it reads; a line through measured decode steps
says how long a step takes that reads so many. Models of tasks are small, those of steps large: what
carries over is the share of its experts that a batch reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sere_ray.evaluation.task_rows import Rows, loss_end, worst_tasks
from sere_ray.policy.policy import RULE_NAMES
from sere_ray.util.errors import SereError
from sere_ray.util.results import load_result

_STEP_FIELDS = {"arm", "step_ms", "experts_read", "batch", "model", "mode"}


@dataclass(frozen=True)
class StepLines:
    """Milliseconds of a step by the experts that a layer reads, at one batch size.

    Over all routers of a result: what a step reads decides, not which gate made it.
    """

    stock: tuple[float, float]
    """Slope and base."""
    own: tuple[float, float]
    """Of steps under ``sere`` and of exact ones, in an engine with the key."""
    extra: dict[str, float]
    """What a step of a rule takes beyond that, for every rule that was timed."""

    def speedup(self, rule: str, exact: float, reads: float) -> float | None:
        """Of a rule's step that reads ``reads`` experts to stock's that reads ``exact``.

        None where the rule was not timed: no engine runs it.
        """
        if rule not in self.extra:
            return None
        (stock_slope, stock_base), (slope, base) = self.stock, self.own
        return (stock_base + stock_slope * exact) / (base + slope * reads + self.extra[rule])


def speed_at_quality(tasks: Sequence[Path], step_times: Path | None, losses: list[float]) -> Rows:
    """For each model, batch size, loss and rule the setting that reads the fewest experts.

    Args:
        tasks: results of ``sere-ray tasks``, S = K among their settings: what exact steps read.
        step_times: of ``sere-ray bench step-time``; None = no speed.
        losses: what the worst task may lose of the exact model's right answers, the upper end of
            the 95 % interval.

    Returns:
        Rows in the form of docs/results/speed-at-quality.json.

    Raises:
        SereError: a file that has not what is needed.
    """
    steps = _step_rows(step_times) if step_times else None
    found: Rows = []
    for path in tasks:
        document = load_result(path)
        for batch in sorted({row["batch"] for row in document["rows"]}):
            rows = [row for row in document["rows"] if row["batch"] == batch]
            found += _of_batch(path, document, batch, rows, steps, losses)
    return found


def _of_batch(
    path: Path,
    document: dict[str, Any],
    batch: int,
    rows: Rows,
    steps: Rows | None,
    losses: list[float],
) -> Rows:
    top_k, num_experts = document["top_k"], document["num_experts"]
    rows = [row for row in rows if row["relative_loss"] is not None]  # the exact model solves some
    exactly = {"rule": "sere", "settings": {"select_top_k": top_k}}
    exact = _reads(rows, exactly)
    if not exact:
        raise SereError(
            f"{path}: no S={top_k} at batch {batch}, which says what exact steps read; run the "
            f"same `sere-ray tasks` with --policies S={top_k} --append"
        )
    usual = float(np.mean(list(exact.values())))
    lines = _lines(steps, batch) if steps else None
    scale = steps[0]["num_experts"] / num_experts if steps else 1.0
    found: Rows = []
    for loss in losses:
        for rule in sorted({row["rule"] for row in rows}):
            kept = [
                worst
                for worst in worst_tasks([row for row in rows if row["rule"] == rule])
                if loss_end(worst) <= loss and not exactly.items() <= worst.items()
            ]
            shares = [(_share(_reads(rows, worst), exact), worst) for worst in kept]
            if not shares:
                continue
            share, worst = min(shares, key=lambda pair: pair[0])
            speedup = lines and lines.speedup(rule, usual * scale, share * usual * scale)
            found.append(
                {
                    "model": path.stem.removeprefix("tasks-"),
                    "batch": batch,
                    "held_loss": loss,
                    "rule": rule,
                    "settings": worst["settings"],
                    "router": f"{usual / num_experts:.0%} of experts read, as the model does",
                    "experts_share": round(share, 3),
                    "worst_task": worst["task"],
                    "task_loss": worst["relative_loss"],
                    "task_loss_95": worst["relative_loss_95"],
                    "step_speedup": round(speedup, 2) if speedup else None,
                    "step_of": steps[0]["model"].split(":")[0] if steps else None,
                }
            )
    return found


def _reads(rows: Rows, setting: dict[str, Any]) -> dict[str, float]:
    """Experts that a setting reads, by task."""
    named = {name: setting[name] for name in ("rule", "settings")}
    return {row["task"]: row["experts_read_mean"] for row in rows if named.items() <= row.items()}


def _share(reads: dict[str, float], exact: dict[str, float]) -> float:
    """Mean over the tasks that both have."""
    return float(np.mean([reads[task] / exact[task] for task in reads if task in exact]))


def _step_rows(path: Path) -> Rows:
    rows = [row for row in load_result(path).get("rows", []) if row.keys() >= _STEP_FIELDS]
    if not rows:
        raise SereError(f"--step-times = {path}: no result of `sere-ray bench step-time`")
    model = rows[0]["model"]
    # "NAME: 48 layers x 128 experts, top-8, ..."
    num_experts = int(model.split(" x ")[1].split()[0])
    return [{**row, "num_experts": num_experts} for row in rows if row["model"] == model]


def _lines(steps: Rows, batch: int) -> StepLines:
    nearest = min({row["batch"] for row in steps}, key=lambda size: abs(size - batch))
    of_rules: dict[str, Rows] = {}
    for row in steps:
        if row["batch"] == nearest:
            of_rules.setdefault(_rule_of(row["arm"]), []).append(row)
    stock, own = (_line(of_rules.get(rule, []), nearest) for rule in ("stock", "sere"))
    extra = {
        rule: float(
            np.mean([row["step_ms"] - np.polyval(own, row["experts_read"]) for row in rows])
        )
        for rule, rows in of_rules.items()
    }
    return StepLines(stock, own, extra)


def _rule_of(arm: str) -> str:
    """``stock``, or the rule: of ``S=2`` and ``off`` it is ``sere``, whose engine they run in."""
    rule = arm.split(",")[0].split("-")[0]
    return rule if rule in ("stock", *RULE_NAMES) else "sere"


def _line(rows: Rows, batch: int) -> tuple[float, float]:
    reads = [row["experts_read"] for row in rows]
    if len(set(reads)) < 2:
        raise SereError(
            f"--step-times: fewer than two numbers of experts read at {batch} rows; measure with "
            "--router skewed,uniform"
        )
    slope, base = np.polyfit(reads, [row["step_ms"] for row in rows], 1)
    return float(slope), float(base)
