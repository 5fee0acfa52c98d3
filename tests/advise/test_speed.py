"""`sere-ray speed`: the fewest experts at a held loss, and how fast a step is then."""

import json

import pytest
from typer.testing import CliRunner

from sere_ray.advise.speed import speed_at_quality
from sere_ray.cli.main import app
from sere_ray.util.errors import SereError


def task_row(task, rule, settings, reads, loss, high, batch=16):
    return {
        "task": task,
        "rule": rule,
        "settings": settings,
        "batch": batch,
        "experts_read_mean": reads,
        "relative_loss": loss,
        "relative_loss_95": [loss - 0.002, high],
    }


EXACT, S2, TAU = {"select_top_k": 4}, {"select_top_k": 2}, {"tau": 0.1}


def tasks_file(folder, rows):
    path = folder / "tasks-small.json"
    content = {"command": "c", "machine": {}, "num_experts": 16, "top_k": 4, "rows": rows}
    path.write_text(json.dumps(content))
    return path


def step_file(folder, stock=((64, 10.0), (32, 6.0)), own=((64, 9.0), (16, 3.0))):
    arms = {"stock": stock, "S=2": own, "margin": ((16, 3.5), (32, 5.5))}
    rows = [
        {
            "model": "big: 2 layers x 64 experts, top-4",
            "batch": 16,
            "arm": arm,
            "mode": None if arm == "stock" else "on",
            "experts_read": reads,
            "step_ms": step_ms,
        }
        for arm, points in arms.items()
        for reads, step_ms in points
    ]
    path = folder / "steps.json"
    path.write_text(json.dumps({"command": "c", "machine": {}, "rows": rows}))
    return path


ROWS = [
    task_row("cloze", "exfold", {"experts": 5}, 5.0, 0.001, 0.002),
    task_row("cloze", "sere", EXACT, 12.0, 0.0, 0.0),
    task_row("copying", "sere", EXACT, 8.0, 0.0, 0.0),
    task_row("cloze", "sere", S2, 6.0, 0.002, 0.005),
    task_row("copying", "sere", S2, 4.0, 0.02, 0.025),
    task_row("cloze", "margin", TAU, 6.0, 0.001, 0.004),
    task_row("copying", "margin", TAU, 6.0, 0.003, 0.008),
    task_row("cloze", "margin", {"tau": 0.01}, 9.0, 0.0, 0.002),
    task_row("copying", "margin", {"tau": 0.01}, 7.0, 0.0, 0.002),
]


def test_the_fewest_experts_whose_worst_task_keeps_the_loss(tmp_path):
    tasks, steps = tasks_file(tmp_path, ROWS), step_file(tmp_path)
    rows = speed_at_quality([tasks], steps, [0.01, 0.03])
    found = {(row["held_loss"], row["rule"]): row for row in rows}
    rules = ("exfold", "margin", "sere")
    every = {(loss, rule) for loss in (0.01, 0.03) for rule in rules}
    assert set(found) == every - {(0.01, "sere")}  # S=2 loses 2.5 % of copying, S=K is exact
    assert found[0.01, "exfold"]["step_speedup"] is None  # no engine runs it
    held = found[0.01, "margin"]
    assert (held["settings"], held["worst_task"]) == (TAU, "copying")
    assert held["experts_share"] == 0.625  # (6/12 + 6/8) / 2
    assert found[0.03, "sere"]["settings"] == S2
    assert found[0.03, "sere"]["task_loss_95"] == pytest.approx([0.018, 0.025])
    # Exact reads 10 of 16, so 40 of 64: 7 ms of stock, and of ours 1 + 40 * 0.5 / 8 ms.
    assert found[0.03, "sere"]["step_speedup"] == pytest.approx(7.0 / 3.5, abs=0.01)
    # margin takes half a millisecond more than sere where both read as much.
    assert held["step_speedup"] == pytest.approx(7.0 / (1 + 25 * 0.125 + 0.5), abs=0.01)
    assert speed_at_quality([tasks], None, [0.01])[0]["step_speedup"] is None


def test_what_is_missing_is_named(tmp_path, has_words):
    tasks = tasks_file(tmp_path, ROWS[3:])
    with pytest.raises(SereError) as caught:
        speed_at_quality([tasks], None, [0.01])
    has_words(str(caught.value), "no S=4 at batch 16", "--policies S=4 --append")
    tasks, steps = tasks_file(tmp_path, ROWS), step_file(tmp_path, stock=((64, 10.0),))
    with pytest.raises(SereError) as caught:
        speed_at_quality([tasks], steps, [0.01])
    has_words(str(caught.value), "fewer than two", "--router skewed,uniform")
    with pytest.raises(SereError, match="no result of `sere-ray bench step-time`"):
        speed_at_quality([tasks], tasks, [0.01])


def test_the_command(tmp_path):
    tasks, steps = tasks_file(tmp_path, ROWS), step_file(tmp_path)
    out = tmp_path / "speed.json"
    arguments = ["speed", str(tasks), "--step-times", str(steps), "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert len(json.loads(out.read_text())["rows"]) == 5
    wrong = CliRunner().invoke(app, [*arguments, "--losses", "much"])
    assert wrong.exit_code == 2
