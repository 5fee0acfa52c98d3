"""The demo's table, and a page with the same numbers and plots."""

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sere_ray.demo.measure import Run, label
from sere_ray.util.page import items, picture, write_page
from sere_ray.util.results import origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("concurrency", "streams", "{}"),
    ("experts_read", "experts", "{:.1f}"),
    ("step_ms", "step ms", "{:.1f}"),
    ("tokens_per_s", "tok/s", "{:.0f}"),
    ("accuracy", "answers", "{:.1%}"),
    ("top1_agreement", "top-1", "{:.1%}"),
    ("kl_mean", "KL", "{:.4f}"),
)
"""Columns after the policy's name: field of :class:`Run`, heading, format."""
HEADINGS = ("policy", *(heading for _, heading, _ in COLUMNS))
NOTES = {
    "experts": "read per layer and decode step, of 48, counted in the engine",
    "step ms": "forward pass of a decode step. Reading fewer experts saves this model no time: it "
    "is so small that it probably stays in a CPU's cache (not measured), so the time of the rule "
    "itself shows; `sere-ray bench step-time` measures a larger one",
    "answers": "arithmetic answered right, through the endpoint",
    "top-1, KL": "agreement with and distance (nats) from the exact model on held-out text, "
    "teacher-forced, with batches of `streams` rows",
    "1 stream": "is exact under every policy: the default floor keeps K = 4 experts",
}


def _cells(run: Run) -> list[str]:
    name = label(run.rule, run.select_top_k, run.threshold)
    return [name, *(form.format(getattr(run, field)) for field, _, form in COLUMNS)]


def print_table(runs: list[Run], console: Console) -> None:
    """Print one row for each run."""
    table = Table(title="stock against re-routed", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in HEADINGS:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    previous = None
    for run in runs:
        if previous not in (None, run.concurrency):
            table.add_section()
        previous = run.concurrency
        table.add_row(*_cells(run))
    console.print(table)
    for name, note in NOTES.items():
        console.print(f"{name}: {note}", style="dim", markup=False, highlight=False)


def write_html(runs: list[Run], path: Path) -> None:
    """Write a self-contained page: plots, table, machine and versions."""
    head = "".join(f"<th>{name}</th>" for name in HEADINGS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(run)) + "</tr>"
        for run in runs
    )
    body = (
        f"<div>{''.join(_plots(runs))}</div>"
        f"<div class=wide><table><tr>{head}</tr>{rows}</table></div>{items(NOTES.items())}"
        f"<h2>Measured on</h2>{items(origin().items())}"
    )
    title = "Stock against re-routed: the demo model on CPU"
    write_page(path, title, body, style="img{width:min(100%,32rem)}")


def _plots(runs: list[Run]) -> list[str]:
    titles = {
        "experts_read": "experts read per layer and step",
        "accuracy": "arithmetic accuracy",
        "kl_mean": "KL to the exact model (nats)",
        "step_ms": "decode step (ms)",
    }
    return [
        picture(_plot(runs, column, title), f"{title} by concurrency")
        for column, title in titles.items()
    ]


def _plot(runs: list[Run], column: str, title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, Any]]] = {}
    for run in runs:
        name = label(run.rule, run.select_top_k, run.threshold)
        lines.setdefault(name, []).append((run.concurrency, getattr(run, column)))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({run.concurrency for run in runs})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("concurrency")
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure
