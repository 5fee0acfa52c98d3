"""Pictures and a page of what ``sere-ray evaluate`` measured."""

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sere_ray.evaluation.comparison import OURS
from sere_ray.evaluation.settings import label
from sere_ray.util.page import items, picture, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
COLUMNS = (
    ("experts_read_mean", "experts", "{:.2f}"),
    ("experts_read_max_rank", "busiest rank", "{:.2f}"),
    ("kl_mean", "KL mean", "{:.5f}"),
    ("kl_p99", "KL p99", "{:.3f}"),
    ("top1_agreement", "top-1", "{:.2%}"),
    ("perplexity", "perplexity", "{:.3f}"),
)
"""Field of a row, heading, format."""
_COLORS = {
    "sere": "C0",
    "topk": "C7",
    "oea": "C1",
    "xshare": "C2",
    "lynx": "C4",
    "k1k2": "C5",
    "ace": "C6",
    "exfold": "C8",
    "mone": "C9",
    "margin": "C3",
    "spare": "black",
}
_STYLE = "td:nth-child(2),th:nth-child(2){text-align:left}img{width:100%}"


def draw_frontier(document: dict[str, Any]) -> "Figure":
    """A panel for each batch size: experts read against KL to the exact model."""
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if row["ranks"] == _fewest_ranks(document)]
    batches = sorted({row["batch"] for row in rows if row["batch"] > 1}) or [1]
    columns = min(3, len(batches))
    lines = -(-len(batches) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, batch in zip(panels, batches, strict=False):
        _draw_panel(axes, [row for row in rows if row["batch"] == batch])
        axes.set_title(f"batch {batch}", fontsize=10, loc="left")
    for axes in panels[len(batches) :]:
        axes.set_axis_off()
    panels[0].legend(fontsize=6)
    figure.supxlabel(f"experts read per layer and step, of {document['num_experts']}", fontsize=10)
    figure.supylabel("KL to the exact model, nats", fontsize=10)
    return figure


def write_frontier_page(document: dict[str, Any], path: Path) -> None:
    """Write a self-contained page: plots, comparison, every row, where it was measured."""
    where = ("command", "data", "similarity", "machine", "versions", "commit", "date")
    body = (
        f"<p>{document['sequences']} held-out texts, {document['scored_positions']} scored "
        "positions, teacher-forced; the same rows for every rule. Small print: 95 % bootstrap "
        "intervals over texts.</p>"
        f"{picture(draw_frontier(document), 'experts read against KL, one panel a batch size')}"
        f"{_comparison(document['comparison'])}<h2>All settings</h2>"
        f"<div class=wide><table>{_head()}{''.join(map(_row, document['rows']))}</table></div>"
        f"<h2>Measured</h2>{items((name, document[name]) for name in where)}"
    )
    write_page(path, f"Re-routing rules on {document['model']}", body, _STYLE)


def _fewest_ranks(document: dict[str, Any]) -> int:
    ranks: list[int] = [row["ranks"] for row in document["rows"]]
    return min(ranks)


def _draw_panel(axes: Any, rows: Rows) -> None:
    """Points of every rule; those of a rule with several families of settings are not joined."""
    for rule in dict.fromkeys(row["rule"] for row in rows):
        own = sorted(
            (row for row in rows if row["rule"] == rule and row["kl_mean"] > 0),
            key=lambda row: row["experts_read_mean"],
        )
        if not own:
            continue
        x, y = ([row[field] for row in own] for field in ("experts_read_mean", "kl_mean"))
        bars = [
            [max(row["kl_mean"] - row["kl_mean_95"][0], 0) for row in own],
            [max(row["kl_mean_95"][1] - row["kl_mean"], 0) for row in own],
        ]
        joined = rule not in ("sere", "lynx", "k1k2", "exfold")
        axes.errorbar(
            x,
            y,
            yerr=bars,
            color=_COLORS.get(rule, "black"),
            marker="o" if rule in OURS else ".",
            linestyle="-" if joined else "",
            linewidth=2 if rule in OURS else 1,
            elinewidth=0.8,
            markersize=3.5,
            label=rule,
        )
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _comparison(rows: Rows) -> str:
    if not rows:
        return ""
    fields = (
        ("experts", "experts of the busiest rank"),
        ("kl", "KL of margin"),
        ("kl_to_sere", "to SERE's"),
        ("kl_to_best_peer", "to the best peer's"),
        ("experts_to_best_peer_at_its_kl", "experts, to the best peer's at its KL"),
    )
    head = "".join(f"<th>{name}</th>" for _, name in fields)
    body = "".join(
        f"<tr><td>{row['batch']}</td><td>{html.escape(row['at'])}</td>"
        f"<td>{row['ranks']}</td><td>{row['best_peer']}</td>"
        + "".join(f"<td>{_with_interval(row, field, '{:.4g}')}</td>" for field, _ in fields)
        + "</tr>"
        for row in rows
    )
    return (
        "<h2>margin against the others</h2><div class=wide><table>"
        f"<tr><th>batch</th><th>at</th><th>ranks</th><th>best peer</th>{head}</tr>"
        f"{body}</table></div>"
    )


def _head() -> str:
    names = ("rule", "settings", "batch", "ranks", *(name for _, name, _ in COLUMNS))
    return "<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"


def _row(row: dict[str, Any]) -> str:
    cells = [row["rule"], label(row["settings"]), row["batch"], row["ranks"]]
    return (
        "<tr>"
        + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
        + "".join(f"<td>{_with_interval(row, field, form)}</td>" for field, _, form in COLUMNS)
        + "</tr>"
    )


def _with_interval(row: dict[str, Any], field: str, form: str) -> str:
    if row.get(field) is None:
        return ""
    low, high = (form.format(edge) for edge in row[f"{field}_95"])
    return f"{form.format(row[field])}<br><small>{low}..{high}</small>"
