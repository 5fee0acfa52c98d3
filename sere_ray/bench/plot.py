"""A picture of a result file."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sere_ray.util.errors import SereError
from sere_ray.util.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
_COLUMNS = 2
"""How many panels stand side by side: those of a model's two routers."""


def draw(document: dict[str, Any], picture: Path) -> None:
    """Write a PNG or SVG.

    Args:
        document: a result file of ``sere-ray bench step-time`` or ``scale``, or of
            ``sere-ray evaluate``.
        picture: file to write; its suffix says the format.

    Raises:
        SereError: the document is another kind of result, or the suffix another format.
    """
    from sere_ray.bench.plot_ranks import draw_scale
    from sere_ray.evaluation.frontier_page import draw_frontier

    kinds: list[tuple[set[str], Callable[[dict[str, Any]], Figure]]] = [
        ({"model", "batch", "arm", "speedup"}, draw_step_time),
        ({"model", "rows_per_rank", "union", "arm", "speedup"}, draw_expert_parallel),
        ({"ranks", "rows_per_rank", "destination_ranks_mean", "samples"}, draw_scale),
        ({"rule", "settings", "experts_read_mean", "kl_mean"}, draw_frontier),
    ]
    rows = document.get("rows") or [{}]
    found = [make for fields, make in kinds if all(fields <= row.keys() for row in rows)]
    if not found:
        raise SereError("not a result of `sere-ray bench step-time`, `scale` or `evaluate`")
    kind = picture.suffix.removeprefix(".")
    if kind not in ("png", "svg"):
        raise SereError(f"{picture}: must end in .png or .svg")
    figure = found[0](document)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format=kind, dpi=130)


def of_model(document: dict[str, Any], name: str) -> dict[str, Any]:
    """The part of a result file that was measured on one model.

    Raises:
        SereError: there is none; says which there are.
    """
    names = [str(row.get("model", "")).partition(":")[0] for row in document.get("rows", [])]
    if name not in names:
        known = ", ".join(sorted(set(names) - {""})) or "none"
        raise SereError(f"--model = {name!r}: the file has {known}")
    rows = [row for row, own in zip(document["rows"], names, strict=True) if own == name]
    return {**document, "rows": rows}


def draw_step_time(document: dict[str, Any]) -> "Figure":
    """Two panels for each model and router, one above the other; dashed lines are the floor."""
    from matplotlib.figure import Figure

    rows = document["rows"]
    panels: dict[tuple[str, str], Rows] = {}
    for row in rows:
        panels.setdefault((row["model"], row.get("router", "uniform")), []).append(row)
    columns = min(len(panels), _COLUMNS)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 6.6 * lines), layout="constrained")
    grid = figure.subplots(2 * lines, columns, squeeze=False)
    for missing in range(len(panels), lines * columns):
        for half in (0, 1):
            grid[2 * (lines - 1) + half][missing % columns].remove()
    for number, ((model, router), own) in enumerate(panels.items()):
        line, column = divmod(number, columns)
        upper, lower = (grid[2 * line + half][column] for half in (0, 1))
        _draw_speedup(upper, own)
        _draw_step(lower, own)
        upper.set_title(textwrap.fill(model, 44) + f"\n{router} routing", fontsize=9, loc="left")
    machine = document["machine"]
    device = machine.get("gpu", machine.get("cpu"))
    ranks = rows[0].get("data_parallel_size", 1)
    where = device if ranks == 1 else f"{ranks} ranks, each on one {device}"
    figure.suptitle(f"decode step on {where}", fontsize=11)
    return figure


def draw_expert_parallel(document: dict[str, Any]) -> "Figure":
    """The same over the rows of a rank, a line for each arm and way of taking the union."""
    rows = [
        {
            **row,
            "batch": row["rows_per_rank"],
            "arm": f"{row['arm']}, {row['union']}" if row["union"] else row["arm"],
        }
        for row in document["rows"]
    ]
    return draw_step_time({**document, "rows": rows})


def _draw_speedup(axes: Any, rows: Rows) -> None:
    for number, (arm, points) in enumerate(_lines(rows).items()):
        if arm == "stock":
            continue
        batches = [row["batch"] for row in points]
        low, high = ([row[field] for row in points] for field in ("speedup_min", "speedup_max"))
        color = f"C{number}"
        axes.plot(batches, [row["speedup"] for row in points], marker="o", color=color, label=arm)
        axes.fill_between(batches, low, high, color=color, alpha=0.15)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("times as fast as stock")
    _finish(axes, rows)


def _draw_step(axes: Any, rows: Rows) -> None:
    for number, (arm, points) in enumerate(_lines(rows).items()):
        batches = [row["batch"] for row in points]
        color = f"C{number}"
        axes.plot(batches, [row["step_ms"] for row in points], marker="o", color=color, label=arm)
        if all("floor_ms" in row for row in points):
            floor = [row["floor_ms"] for row in points]
            axes.plot(batches, floor, linestyle="--", linewidth=1, color=color)
    dashed = "; dashed: memory floor" if any("floor_ms" in row for row in rows) else ""
    axes.set_ylabel(f"step, ms{dashed}")
    _finish(axes, rows)


def _lines(rows: Rows) -> dict[str, Rows]:
    """Points of each arm, by batch size."""
    lines: dict[str, Rows] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        lines.setdefault(row["arm"], []).append(row)
    order = list(dict.fromkeys(row["arm"] for row in rows))
    return {arm: lines[arm] for arm in order}


def _finish(axes: Any, rows: Rows) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted({row["batch"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("rows per rank" if "rows_per_rank" in rows[0] else "batch")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
