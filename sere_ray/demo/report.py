"""The demo's table, and a page with the same numbers and plots."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sere_ray.demo.measure import Run, label
from sere_ray.util.files import atomic_path
from sere_ray.util.results import origin

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
    notes = "".join(
        f"<li><b>{html.escape(name)}</b>: {html.escape(note)}</li>" for name, note in NOTES.items()
    )
    where = "".join(
        f"<li>{html.escape(name)}: {html.escape(_plain(value))}</li>"
        for name, value in origin().items()
    )
    plots = "".join(
        f'<img alt="{html.escape(name)} by concurrency" '
        f'src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'
        for name, svg in _plots(runs)
    )
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        "<title>sere-ray demo</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;"
        "text-align:right}td:first-child,th:first-child{text-align:left}"
        "img{width:min(100%,32rem)}.wide{overflow-x:auto}"
        "</style><h1>Stock against re-routed: the demo model on CPU</h1>"
        f"<div>{plots}</div><div class=wide><table><tr>{head}</tr>{rows}</table></div>"
        f"<ul>{notes}</ul><h2>Measured on</h2><ul>{where}</ul></html>"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _plain(value: Any) -> str:
    """A field of the origin in words; mappings as ``name value, name value``."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return str(value)


def _plots(runs: list[Run]) -> list[tuple[str, bytes]]:
    titles = {
        "experts_read": "experts read per layer and step",
        "accuracy": "arithmetic accuracy",
        "kl_mean": "KL to the exact model (nats)",
        "step_ms": "decode step (ms)",
    }
    return [(title, _plot(runs, column, title)) for column, title in titles.items()]


def _plot(runs: list[Run], column: str, title: str) -> bytes:
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()
