"""What ``sere-ray tune`` found, as a table."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sere_ray.evaluation.settings import label
from sere_ray.evaluation.tables import loss_interval
from sere_ray.evaluation.task_rows import loss_end
from sere_ray.evaluation.tune_tasks import described


def print_report(found: dict[str, Any], console: Console) -> None:
    """Predicted and checked, one row for each batch size."""
    print_settings(found["policy"], console)
    table = Table(box=SIMPLE_HEAD)
    for heading in ("text", "batch", "experts", "of exact", "KL, nats", "top-1"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    for name, rows in (("predicted", found["predicted"]), ("second text", found["checked"])):
        for row in rows:
            table.add_row(
                name,
                str(row["batch"]),
                f"{row['experts_read_mean']:.2f}",
                _with_interval(row, "experts_to_exact", "{:.1%}"),
                _with_interval(row, "kl_mean", "{:.4f}"),
                f"{row['top1_agreement']:.2%}",
            )
        table.add_section()
    console.print(table)
    if "tasks_checked" in found:
        _print_tasks(found, console)
    kept = found["keeps_the_budget_on_the_second_text"]
    console.print(
        "the second text keeps the budget, interval and all"
        if kept
        else "the second text does not keep the budget with its whole interval: allow for it, or "
        "choose on more text"
    )


def _print_tasks(found: dict[str, Any], console: Console) -> None:
    """Both texts side by side, a row for each task, range and its end."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("task", "batch", "predicted loss", "second text", "items"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    pairs = zip(found["tasks_predicted"], found["tasks_checked"], strict=True)
    for predicted, checked in pairs:
        losses = map(loss_interval, (predicted, checked))
        items = f"{predicted['items']:,}, {checked['items']:,}"
        table.add_row(predicted["task"], str(predicted["batch"]), *losses, items)
    console.print(table)
    worst = max(found["tasks_checked"], key=loss_end)
    console.print(
        f"worst on the second text: {described(worst)}; budget {found['budget']['task_loss']:.1%}",
        highlight=False,
    )


def print_settings(policy: dict[str, Any], console: Console) -> None:
    """The rule, and a line for each range of batch sizes."""
    keys = {k: v for k, v in policy.items() if k not in ("similarity", "by_rows")}
    entries = policy.get("by_rows", [])
    console.print(f"rule {policy['rule']}", highlight=False)
    for entry in entries:
        own = {**keys, **{key: value for key, value in entry.items() if key != "up_to"}}
        console.print(f"  up to {entry['up_to']} rows: {label(own)}", highlight=False)
    console.print(f"  {'more' if entries else 'any step'}: {label(keys)}", highlight=False)


def _with_interval(row: dict[str, Any], field: str, form: str) -> str:
    low, high = (form.format(edge) for edge in row[f"{field}_95"])
    return f"{form.format(row[field])} ({low}..{high})"
