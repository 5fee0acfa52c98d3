"""What a setting did in a task, as a row of a result, and the worst task of each setting."""

import json
from typing import Any

import numpy as np

from sere_ray.evaluation.paired import Paired, mcnemar_p
from sere_ray.evaluation.task_run import Found

Keys = dict[str, Any]
Rows = list[dict[str, Any]]
_LOSS = ("relative_loss", "relative_loss_95")


def row_of(task: str, keys: Keys, batch: int, found: Found, half_width: float) -> dict[str, Any]:
    """The row of a setting, every item beside the exact model's answer."""
    return {
        "task": task,
        **named(keys),
        "batch": batch,
        **paired_fields(Paired.join(found.parts), half_width),
        "ended_by": found.ended_by,
        "experts_read_mean": round(float(np.mean(found.reads)), 3),
        "expert_rows_share": round(float(np.mean(found.rows_shares)), 4),
        "level": keys.get("level"),
    }


def paired_fields(paired: Paired, half_width: float) -> dict[str, Any]:
    """The fields of a row that count answers.

    Args:
        paired: the answers.
        half_width: of a relative loss's interval, for the number of items that give it.
    """
    return {**counted_fields(paired), "items_needed": paired.items_needed(half_width)}


def counted_fields(paired: Paired) -> dict[str, Any]:
    """The same without how many items a half-width takes."""
    loss = paired.relative_loss()
    none = {"relative_loss": None, "relative_loss_95": None}
    return {
        "items": len(paired.exact),
        "right": int(paired.rule.sum()),
        "right_exact": int(paired.exact.sum()),
        "lost": paired.lost,
        "won": paired.won,
        **(loss.fields("relative_loss", 5) if loss else none),
        "mcnemar_p": float(f"{mcnemar_p(paired.lost, paired.won):.4g}"),
    }


def is_in(rows: Rows, keys: Keys) -> bool:
    """Whether one of the rows is of a setting."""
    return any(named(keys).items() <= row.items() for row in rows)


def worst_tasks(
    rows: Rows,
    of: tuple[str, ...] = ("rule", "settings", "batch"),
    also: tuple[str, ...] = (),
) -> Rows:
    """For each setting and batch size the task whose loss may be highest: by its interval's end.

    Tasks that the exact model never solves say nothing and are left out.

    Args:
        rows: of a result.
        of: fields that tell settings apart.
        also: further fields to keep.
    """
    worst: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = json.dumps([row[field] for field in of])
        if row["relative_loss"] is None:
            continue
        if name not in worst or loss_end(worst[name]) < loss_end(row):
            worst[name] = {field: row[field] for field in (*of, "task", *also, *_LOSS)}
    return list(worst.values())


def loss_end(row: dict[str, Any]) -> float:
    """The most that a row's setting may lose: the bad end of its interval."""
    high: float = row["relative_loss_95"][1]
    return high


def named(keys: Keys) -> Keys:
    """Rule and settings as a row has them."""
    shown = {key: value for key, value in keys.items() if key != "rule" and value is not None}
    return {"rule": keys["rule"], "settings": shown}
