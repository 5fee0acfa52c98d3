"""The page that says what to switch on, what it gains, what it costs, and what to check."""

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sere_ray.evaluation.settings import label
from sere_ray.util.page import items, picture, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADINGS = (
    "right answers that may be lost",
    "experts read, of exact's",
    "a decode step is faster by",
    "worst task, first text",
    "worst task, second text",
    "setting",
)


def write_advice(document: dict[str, Any], chosen_loss: float, path: Path) -> None:
    """Write the page, with its pictures inside.

    Args:
        document: content of `advise.json`.
        chosen_loss: of the policy that was written.
        path: the HTML file.
    """
    where = ("command", "machine", "versions", "commit", "date")
    body = (
        f"<p>{_verdict(document, chosen_loss)}</p>"
        f"<div class=wide><table><tr>{''.join(f'<th>{h}</th>' for h in _HEADINGS)}</tr>"
        f"{''.join(_row(row, document) for row in document['rows'])}</table></div>"
        f"<p>{_times(document)} A loss is relative to what the exact model has right; in brackets "
        "its 95 % interval, whose bad end must keep the loss.</p>"
        f"{picture(draw(document), 'experts read against right answers lost')}"
        f"<h2>What to check</h2>{_checks(document, chosen_loss)}"
        f"<h2>Measured</h2>{items((name, document[name]) for name in where)}"
    )
    write_page(path, f"Re-routing {document['model']}, {document['batch']} rows a step", body)


def draw(document: dict[str, Any]) -> "Figure":
    """Loss of every task, with its interval, against experts read; one line a task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    share = {_name(row): row["experts_to_exact"] for row in document["compared"]}
    for task in dict.fromkeys(row["task"] for row in document["asked"]):
        rows = [
            r for r in document["asked"] if r["task"] == task and r["relative_loss"] is not None
        ]
        rows.sort(key=lambda row: share[_name(row)])
        loss = [100 * row["relative_loss"] for row in rows]
        ends = [
            [100 * abs(row["relative_loss_95"][i] - row["relative_loss"]) for row in rows]
            for i in (0, 1)
        ]
        x = [100 * share[_name(row)] for row in rows]
        axes.errorbar(x, loss, yerr=ends, marker=".", linewidth=1, elinewidth=0.7, label=task)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_yscale("symlog", linthresh=2)
    ticks = (-1, 0, 1, 3, 10, 30, 100)
    axes.set_yticks(ticks, labels=list(map(str, ticks)))
    axes.set_yticks([], minor=True)
    axes.set_ylim(-2, max(2, *axes.get_ylim()))
    axes.set_xlabel("experts read, % of what exact steps read")
    axes.set_ylabel("right answers lost, %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def _name(row: dict[str, Any]) -> tuple[str, str]:
    return row["rule"], str(row["settings"])


def _verdict(document: dict[str, Any], loss: float) -> str:
    """The first sentence."""
    row = next(row for row in document["rows"] if row["loss"] == loss)
    if row["rule"] is None:
        return (
            f"<b>No setting was shown to keep {loss:.1%}.</b> That may be the text's size: see "
            "how many items it takes below."
        )
    gain = f", a decode step {row['step_speedup']:.2f}x as fast" if row["step_speedup"] else ""
    return (
        f"<b>Switch on {html.escape(row['rule'])}: {row['experts_share']:.0%} of the experts are "
        f"read{gain}</b>, at a loss of at most {loss:.1%} of right answers in every task asked."
    )


def _row(row: dict[str, Any], document: dict[str, Any]) -> str:
    name = "none measurable" if row["loss"] == document["no_loss"] else f"{row['loss']:.1%}"
    if row["rule"] is None:
        return f"<tr><td>{name}</td><td colspan=5>no setting was shown to keep it</td></tr>"
    setting = html.escape(f"{row['rule']} {label(row['settings'])}")
    gain = f"{row['step_speedup']:.2f}x" if row["step_speedup"] else "not measured"
    cells = (
        name,
        f"{row['experts_share']:.0%}",
        gain,
        _loss(row, "worst_task", "task_loss"),
        _loss(row, "checked_task", "checked_loss"),
        setting,
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _loss(row: dict[str, Any], task: str, loss: str) -> str:
    low, high = row[f"{loss}_95"]
    return f"{row[task]} {row[loss]:.1%} <small>({low:.1%} to {high:.1%})</small>"


def _times(document: dict[str, Any]) -> str:
    curve = document["step_times"]
    if curve is None:
        return (
            "No step times were given, so no speed is predicted: measure them on your GPU with "
            "<code>sere-ray bench step-time</code> and give the file with "
            "<code>--step-times</code>."
        )
    return (
        f"Predicted from a line through measured steps of {html.escape(curve['model'])} on "
        f"{html.escape(curve['gpu'])} at {curve['batch']} rows: {curve['base_ms']:.2f} ms and "
        f"{curve['per_expert_ms']:.3f} ms for each expert read."
    )


def _checks(document: dict[str, Any], loss: float) -> str:
    rows = [row for row in document["rows"] if row["rule"] is not None]
    points = []
    for row in rows:
        if row["checked_loss_95"][1] > row["loss"]:
            points.append(
                f"At {row['loss']:.1%} the second text does not rule out a larger loss "
                f"({row['checked_task']}: up to {row['checked_loss_95'][1]:.1%}): give more text, "
                "or take the next lighter setting."
            )
    wide = [r for r in document["asked"] if r["ended_by"] != "half_width"]
    if wide:
        most = max(wide, key=lambda row: row["items_needed"])
        points.append(
            f"Intervals are as wide as the items allow. For +-{document['no_loss'] / 2:.2%} "
            f"{most['task']} would take some {most['items_needed']:,} items, it had "
            f"{most['items']:,}."
        )
    points += [
        "The text says how your users ask only as far as it is like their questions.",
        "Serve it beside the exact model and compare on your own tasks: "
        "<code>sere-ray compare</code>.",
    ]
    return f"<ul>{''.join(f'<li>{point}</li>' for point in points)}</ul>"
