"""Picture of simulated scale: what happens over many ranks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]


def draw_scale(document: dict[str, Any]) -> "Figure":
    """By rows per rank: the busiest rank's experts, destinations and bytes; skewed gates.

    Files up to commit f52e2f4 have arms of the key ``prefer_local_rank``, which are left out.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple[str, int], Rows] = {}
    for row in document["rows"]:
        has_key = row.get("prefer_local_rank") is not None
        shown = not has_key and (row["threshold"] is None or _is_one(row))
        if shown and row["router"] == "skewed" and row["ranks"] in (8, 64, 256):
            panels.setdefault((row["shape"], row["ranks"]), []).append(row)
    fields = (
        ("experts_read_max_rank", "experts read, busiest rank"),
        ("destination_ranks_mean", "destination ranks of a row"),
        ("kib_per_row", "KiB of a row, there and back"),
    )
    figure = Figure(figsize=(3.6 * len(panels), 9.6), layout="constrained")
    grid = figure.subplots(len(fields), len(panels), squeeze=False)
    for column, ((shape, ranks), own) in enumerate(panels.items()):
        grid[0][column].set_title(f"{shape}, {ranks} ranks", fontsize=9)
        lines: dict[str, Rows] = {}
        for row in own:
            lines.setdefault(_name(row), []).append(row)
        for line, (field, label) in enumerate(fields):
            axes = grid[line][column]
            for name, points in lines.items():
                style = {"linestyle": ":" if "local union" in name else "-", "marker": "."}
                counts = [row["rows_per_rank"] for row in points]
                axes.plot(counts, [row[field] for row in points], label=name, **style)
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.set_xlabel("rows per rank")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(label)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle("simulated, skewed gates, floor K; no time is measured", fontsize=11)
    return figure


def _is_one(row: dict[str, Any]) -> bool:
    return bool(row["select_top_k"] == 1)


def _name(row: dict[str, Any]) -> str:
    parts = [f"S={row['select_top_k']}"]
    if row["threshold"] is not None:
        parts.append(f"rho={row['threshold']}")
    if row["union"] == "local":
        parts.append("local union")
    return ", ".join(parts)
