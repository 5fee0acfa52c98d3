"""What ``sere-ray evaluate`` and ``sere-ray tasks`` found, as tables on the terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sere_ray.evaluation.settings import label
from sere_ray.evaluation.task_rows import worst_tasks

_MOST_ROWS = 40
_SCALE = (
    "mean KL of quantisations of one 8B model, as llama.cpp prints it: Q8_0 0.00024, Q5_K_M "
    "0.0047, IQ3_M 0.066 (huggingface.co/eaddario/Watt-Tool-8B-GGUF)"
)
"""So that a KL says something to a reader who knows quantisations."""
_MORE = "give a higher --most-items"
_WRAPPED = ("policy", "asked")
"""Columns of words, that give way to numbers."""
_DISTANCE = (
    ("experts_read_mean", "reads", "{:.1f}"),
    ("kl_mean", "KL mean", "{:.5f}"),
    ("kl_median", "median", "{:.4f}"),
    ("kl_p99", "99 %", "{:.3f}"),
    ("kl_p999", "99.9 %", "{:.3f}"),
    ("kl_max", "max", "{:.2f}"),
    ("delta_p_rms", "RMS dp", "{:.1%}"),
    ("top1_agreement", "same top", "{:.1%}"),
)


def print_distance(rows: list[dict[str, Any]], console: Console) -> None:
    """How far settings are from the exact model, in the numbers of llama.cpp's perplexity tool.

    Args:
        rows: of ``sere-ray evaluate``; of too many, those of the largest batch.
        console: where to.
    """
    shown = [row for row in rows if row["ranks"] == min(row["ranks"] for row in rows)]
    if len(shown) > _MOST_ROWS:
        largest = max(row["batch"] for row in shown)
        shown = [row for row in shown if row["batch"] == largest]
    table = plain_table("policy", "B", *(heading for _, heading, _ in _DISTANCE))
    for row in shown:
        numbers = (form.format(row[field]) for field, _, form in _DISTANCE)
        table.add_row(_policy(row), str(row["batch"]), *numbers)
    console.print(table)
    console.print(_SCALE, highlight=False)


def print_tasks(document: dict[str, Any], console: Console) -> None:
    """Every row of ``sere-ray tasks``, which tasks had too few items, each policy's worst task."""
    headings = ("items", "exact", "lost", "won", "relative loss", "p")
    table = plain_table("task", "policy", "B", *headings)
    for row in document["rows"]:
        numbers = f"{row['right_exact'] / row['items']:.1%}", str(row["lost"]), str(row["won"])
        of_row = row["task"], _policy(row), str(row["batch"]), str(row["items"])
        table.add_row(*of_row, *numbers, loss_interval(row), f"{row['mcnemar_p']:.2g}")
    console.print(table)
    for task in dict.fromkeys(row["task"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["task"] == task]
        needed = [row["items_needed"] for row in rows]
        if None in needed:
            console.print(f"{task}: the exact model has none right, so it says nothing here")
        elif any(row["items_needed"] > row["items"] for row in rows):
            at_end = {row.get("ended_by") for row in rows} == {"text"}
            console.print(
                f"{task}: {min(row['items'] for row in rows):,} items; +-"
                f"{document['half_width']:.2%} takes {max(needed):,}: "
                + ("the text has no more, give a longer one" if at_end else _MORE),
                highlight=False,
            )
    for row in worst_tasks(document["rows"]):
        console.print(
            f"{_policy(row)}, batch {row['batch']}: worst is {row['task']}, {loss_interval(row)}",
            highlight=False,
        )


def loss_interval(row: dict[str, Any]) -> str:
    """A row's relative loss with its interval; ``-`` where the exact model is never right."""
    if row["relative_loss"] is None:
        return "-"
    low, high = row["relative_loss_95"]
    return f"{row['relative_loss']:.1%} ({low:.1%}..{high:.1%})"


def _policy(row: dict[str, Any]) -> str:
    settings = label(row["settings"])
    return settings if settings == row["rule"] else f"{row['rule']} {settings}"


def plain_table(*headings: str) -> Table:
    """A table of numbers; tasks and policies are at the left."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        left = heading in ("task", *_WRAPPED)
        table.add_column(
            heading,
            justify="left" if left else "right",
            no_wrap=heading not in _WRAPPED,
            min_width=None if heading in _WRAPPED else len(heading),
        )
    return table
