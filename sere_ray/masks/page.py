"""A page of a training: validation KL, and what is kept, over the steps of its levels."""

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sere_ray.util.page import items, picture, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = (
    ("level", "level", "{}"),
    ("knob", "knob", "{:g}"),
    ("step", "step", "{:,}"),
    ("tokens", "tokens", "{:,}"),
    ("kl_mean", "KL, nats", "{:.4f}"),
    ("slots_kept", "slots kept", "{:.1%}"),
    ("experts_kept", "experts of a batch kept", "{:.1%}"),
    ("bytes_sent", "bytes a worker sent", "{:,}"),
)
"""Field of a row, heading, format."""


def draw_training(rows: list[dict[str, Any]], steps: int) -> "Figure":
    """KL, means of what is kept, and experts kept by layer, each over the steps of all levels.

    Args:
        rows: what validation said.
        steps: of a level.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    kl, means, layers = figure.subplots(1, 3)
    at = [(row["level"] - 1) * steps + row["step"] for row in rows]
    kl.plot(at, [row["kl_mean"] for row in rows], marker=".")
    kl.set_title("KL to the exact model, nats", fontsize=10, loc="left")
    for field, name in (("slots_kept", "slots"), ("experts_kept", "experts of a batch")):
        means.plot(at, [row[field] for row in rows], marker=".", label=name)
    means.set_title("share kept, mean over layers", fontsize=10, loc="left")
    means.legend(fontsize=7)
    by_layer = zip(*(row["experts_kept_by_layer"] for row in rows), strict=True)
    for layer, shares in enumerate(by_layer):
        layers.plot(at, shares, marker=".", label=f"{layer}")
    layers.set_title("experts kept, by MoE layer", fontsize=10, loc="left")
    if len(layers.lines) <= 8:
        layers.legend(fontsize=7)
    for axes in (kl, means, layers):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        for level in sorted({row["level"] for row in rows})[:-1]:
            axes.axvline(level * steps, color="gray", linewidth=0.8, linestyle=":")
    figure.supxlabel("steps of all levels", fontsize=10)
    return figure


def write_training_page(report: dict[str, Any], path: Path) -> None:
    """Write a self-contained page: curves, every validation, what was trained on what.

    Args:
        report: a document as ``sere-ray train-masks --report`` writes it.
        path: the HTML file; replaced in one step.
    """
    rows, settings = report["rows"], report["settings"]
    head = "".join(f"<th>{name}</th>" for _, name, _ in _COLUMNS)
    table = "".join(
        "<tr>" + "".join(f"<td>{form.format(row[field])}</td>" for field, _, form in _COLUMNS)
        for row in rows
    )
    about = "KL to the exact model and shares of slots and experts kept, over steps"
    body = (
        "<p>On validation windows, every row masked, prompts too. A dotted line ends a level.</p>"
        f"{picture(draw_training(rows, settings['steps']), about)}"
        f"<div class=wide><table><tr>{head}</tr>{table}</table></div>"
        f"<p>Text: {html.escape(report['data'])}. {report['seconds']} seconds.</p>"
        f"<h2>Settings</h2>{items(settings.items())}"
    )
    write_page(path, f"Masks of {report['model']}", body, "img{width:100%}")
