"""The demo's tables and its one line in words, on the terminal and as a page."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sere_ray.demo.measure import Quality, Run
from sere_ray.demo.speed import Speed
from sere_ray.util.page import items, picture, write_page
from sere_ray.util.results import origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cells = tuple[Sequence[str], list[list[str]]]
"""Headings, and rows of as many cells."""
NOTES = {
    "margin 0.01": "rule `margin`, tau = 0.01 on the trained model. S=2: the published rule",
    "experts": "read per layer and decode step, of 48. `margin` and S = 2 read them on both models",
    "same, KL": "trained model, held-out text, teacher-forced: agreement with and distance "
    "(nats) from the exact model",
    "step, faster": "random model of 1.9 GB, beyond a CPU's cache; times as fast as stock, lowest "
    "and highest of the rounds. stock is the same engine in mode `off`",
    "answers": "trained model, arithmetic answered right, through the endpoint. It fits a CPU's "
    "cache, so reading less of it saves no time and the rule's own time shows",
}


def summary(quality: Sequence[Quality], speeds: Sequence[Speed]) -> str:
    """What was gained at what cost, in words: of the first setting after stock.

    Args:
        quality: of one batch size, stock first.
        speeds: of the same policies.
    """
    exact, setting = quality[:2]
    speed = speeds[1]
    gain = f"{speed.speedup:.2f} times as fast"
    if speed.speedup_min <= 1:
        gain += f" (not sure: {speed.speedup_min:.2f} to {speed.speedup_max:.2f})"
    text = (
        f"{setting.policy}: with {setting.streams} streams a decode step reads "
        f"{setting.experts_read:.0f} of {exact.experts_read:.0f} experts and is {gain}; "
        f"{setting.top1_agreement:.0%} of the tokens stay the same"
    )
    published = next((each for each in quality if each.policy.startswith("S=")), None)
    if published is None:
        return text + "."
    return (
        f"{text}. The published rule ({published.policy}) reads {published.experts_read:.0f}: "
        f"{published.top1_agreement:.0%} stay the same."
    )


def comparison(quality: Sequence[Quality], speeds: Sequence[Speed]) -> Cells:
    """Loss on the trained model beside speed on the large one, by policy and batch size.

    Args:
        quality: of all batch sizes.
        speeds: of the largest of them.
    """
    largest = max(each.streams for each in quality)
    of_policy = {speed.policy: speed for speed in speeds}
    rows = []
    for each in quality:
        row = [
            each.policy,
            str(each.streams),
            f"{each.experts_read:.1f}",
            f"{each.top1_agreement:.1%}",
            f"{each.kl_mean:.4f}",
        ]
        if each.streams == largest:
            speed = of_policy[each.policy]
            spread = f"{speed.speedup:.2f} ({speed.speedup_min:.1f}-{speed.speedup_max:.1f})"
            row += [f"{speed.experts_read:.1f}", f"{speed.step_ms:.1f}", spread]
        rows.append(row + [""] * (8 - len(row)))
    head = ("policy", "rows", "experts", "same", "KL", "experts", "step ms", "faster")
    return head, rows


def served(runs: Sequence[Run]) -> Cells:
    """What clients of the endpoint saw."""
    head = ("policy", "streams", "experts", "answers", "step ms", "tok/s")
    rows = [
        [
            run.policy,
            str(run.concurrency),
            f"{run.experts_read:.1f}",
            f"{run.accuracy:.1%}",
            f"{run.step_ms:.1f}",
            f"{run.tokens_per_s:.0f}",
        ]
        for run in runs
    ]
    return head, rows


def print_table(title: str, cells: Cells, console: Console) -> None:
    """Print one row for each row of cells."""
    head, rows = cells
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for name in head:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_notes(console: Console) -> None:
    """Say what the columns are."""
    for name, note in NOTES.items():
        console.print(f"{name}: {note}", style="dim", markup=False, highlight=False)


def write_html(
    quality: Sequence[Quality], speeds: Sequence[Speed], runs: Sequence[Run], words: str, path: Path
) -> None:
    """Write a self-contained page: the line in words, plots, tables, machine and versions."""
    tables = "".join(map(_table, (comparison(quality, speeds), served(runs))))
    body = (
        f"<p>{html.escape(words)}</p><div>{''.join(_plots(quality, speeds))}</div>"
        f"<div class=wide>{tables}</div>{items(NOTES.items())}"
        f"<h2>Measured on</h2>{items(origin().items())}"
    )
    title = "Stock against re-routed on CPU"
    write_page(path, title, body, style="img{width:min(100%,32rem)}")


def _table(cells: Cells) -> str:
    head, rows = cells
    names = "".join(f"<th>{name}</th>" for name in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{names}</tr>{lines}</table>"


def _plots(quality: Sequence[Quality], speeds: Sequence[Speed]) -> list[str]:
    largest = max(each.streams for each in quality)
    loss = {each.policy: each for each in quality if each.streams == largest}
    points = {
        "KL to the exact model (nats)": [
            (q.experts_read, q.kl_mean, q.policy) for q in loss.values()
        ],
        "decode step (ms)": [(s.experts_read, s.step_ms, s.policy) for s in speeds],
    }
    return [
        picture(_plot(of_plot, title), f"{title} by experts read")
        for title, of_plot in points.items()
    ]


def _plot(points: list[tuple[float, float, str]], title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes: Any = figure.subplots()
    for reads, value, name in points:
        axes.plot([reads], [value], marker="o", linestyle="", label=name)
    axes.set_xlabel("experts read per layer and step, of 48")
    axes.set_title(title)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure
