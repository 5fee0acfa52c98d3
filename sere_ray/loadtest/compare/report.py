"""What ``sere-ray compare`` found, as tables on the terminal."""

from typing import Any

from rich.console import Console

from sere_ray.evaluation.tables import loss_interval, plain_table


def print_comparison(found: dict[str, Any], console: Console) -> None:
    """A table for each policy, how answers changed, and the worst task of each."""
    for policy in dict.fromkeys(row["policy"] for row in found["rows"]):
        console.print(policy, highlight=False, markup=False)
        table = plain_table("asked", "items", "exact", "lost", "won", "relative loss", "p")
        for row in found["rows"]:
            if row["policy"] == policy:
                table.add_row(*_cells(row))
        console.print(table)
    told = set()
    for row in found["rows"]:
        for name in ("characters", "tokens", "repetition"):
            if f"{name}_change" in row and (row["task"], row["policy"], name) not in told:
                told.add((row["task"], row["policy"], name))
                console.print(_change(row, name), highlight=False, markup=False)
    for policy in dict.fromkeys(row["policy"] for row in found["rows"]):
        worst = found["worst"].get(policy)
        console.print(
            f"{policy}: worst is {worst['task']}: {worst['scored_by']}, {loss_interval(worst)}"
            if worst
            else f"{policy}: the exact model has none right, so these tasks say nothing here",
            highlight=False,
            markup=False,
        )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['task']}: {row['scored_by']}",
        str(row["items"]),
        f"{row['right_exact'] / row['items']:.1%}",
        str(row["lost"]),
        str(row["won"]),
        loss_interval(row),
        f"{row['mcnemar_p']:.2g}",
    )


def _change(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_change_95"]
    return (
        f"{row['task']} under {row['policy']}: {name} of an answer {row[f'{name}_mean_exact']:.4g} "
        f"-> {row[f'{name}_mean']:.4g} ({low:+.2g}..{high:+.2g}), at most {row[f'{name}_max']:.4g}"
    )
