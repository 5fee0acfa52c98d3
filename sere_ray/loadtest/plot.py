"""Pictures of a load test's result."""

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
_PANELS = (
    ("tpot_ms_p90", "p90 time per output token, ms"),
    ("ttft_ms_p90", "p90 time to first token, ms"),
    ("usd_per_million_output_tokens", "$ per million output tokens\nof requests within the SLO"),
)


def policies(rows: Rows) -> list[str]:
    """Names of the policies, in the order of the rows."""
    return list(dict.fromkeys(row["policy"] or "the endpoint" for row in rows))


def by_load(rows: Rows) -> dict[str, Rows]:
    """Rows grouped by amount of load (``16 streams``, ``2 requests/s``), from little to much."""
    loads: dict[str, Rows] = {}
    for row in sorted(rows, key=lambda row: row.get("rate") or row["streams"]):
        rate = row.get("rate")
        name = f"{row['streams']} streams" if rate is None else f"{rate:g} requests/s"
        loads.setdefault(name, []).append(row)
    return loads


def draw(document: dict[str, Any]) -> "Figure":
    """Latency and cost: over the load where there are several, else by policy and block."""
    from matplotlib.figure import Figure

    rows: Rows = document["rows"]
    several = len(by_load(rows)) > 1
    one = _draw_by_load if several else _draw_by_policy
    panels = [
        (label, partial(one, rows=rows, name=name))
        for name, label in _PANELS
        if any(row.get(name) is not None for row in rows)
    ]
    blocks: Rows = document.get("blocks", [])
    if not several and len(blocks) > 1:
        panels.append(
            ("median TPOT of each block, ms", partial(_draw_blocks, rows=rows, blocks=blocks))
        )
    figure = Figure(figsize=(4.2 * max(len(panels), 1), 3.6), layout="constrained")
    grid = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axes, (label, draw_panel) in zip(grid, panels, strict=False):
        draw_panel(axes)
        axes.set_ylabel(label, fontsize=9)
        axes.set_ylim(0, 1.1 * axes.dataLim.y1 or 1)
        axes.grid(alpha=0.3, axis="y")
    return figure


def _draw_by_load(axes: Any, rows: Rows, name: str) -> None:
    """A line for each policy over the offered load."""
    by_rate = rows[0].get("rate") is not None
    names = policies(rows)
    rows = sorted(rows, key=lambda row: row["rate"] if by_rate else row["streams"])
    for number, policy in enumerate(names):
        own = [row for row in rows if row["policy"] == policy and row.get(name) is not None]
        loads = [row["rate"] if by_rate else row["streams"] for row in own]
        axes.plot(loads, [row[name] for row in own], marker="o", color=f"C{number}", label=policy)
        pairs = [row.get(f"{name}_95", (None, None)) for row in own]
        if all(None not in pair for pair in pairs):
            low, high = zip(*pairs, strict=True)
            axes.fill_between(loads, low, high, color=f"C{number}", alpha=0.15)
    axes.set_xlabel("offered requests per second" if by_rate else "streams")
    axes.legend(fontsize=8)


def _draw_by_policy(axes: Any, rows: Rows, name: str) -> None:
    for number, row in enumerate(rows):
        value = row.get(name)
        if value is not None:
            axes.bar(number, value, color=f"C{number}")
            low, high = row.get(f"{name}_95", (None, None))
            if low is not None and high is not None:
                spread = [[max(value - low, 0)], [max(high - value, 0)]]
                axes.errorbar(number, value, yerr=spread, color="black", capsize=4)
    axes.set_xticks(range(len(rows)), policies(rows))


def _draw_blocks(axes: Any, rows: Rows, blocks: Rows) -> None:
    """Blocks in the order in which they ran: if the machine drifts, all policies slope."""
    for number, policy in enumerate(policies(rows)):
        points = [(i, b["tpot_ms_p50"]) for i, b in enumerate(blocks, 1) if b["policy"] == policy]
        axes.plot(*zip(*points, strict=True), "o", color=f"C{number}", label=policy)
    axes.set_xlabel("block, in order of time")
    axes.legend(fontsize=8)
