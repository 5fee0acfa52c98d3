import json
import tarfile
import time
from pathlib import Path

import pytest
import typer
import yaml
from rich.console import Console

from sere_ray.bench.host import read_plan, run_host
from sere_ray.bench.host_check import check_commands
from sere_ray.cli.main import app
from sere_ray.util.errors import SereError

ROOT = Path(__file__).parents[2]
COMMAND_LINE = typer.main.get_command(app)
PLANS = sorted((ROOT / "loadtest" / "hosts").glob("*.yaml"))


def plan_of(folder, gpus=2, **lanes):
    """A plan with a lane of commands for each name; lane i has GPU i."""
    content = [
        {"name": name, "gpus": [number], "commands": commands}
        for number, (name, commands) in enumerate(lanes.items())
    ]
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"gpus": gpus, "lanes": content}))
    return read_plan(path)


def python(code):
    return f"python -c '{code}'"


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_commands_of_our_plans_are_commands(path):
    check_commands(read_plan(path), COMMAND_LINE, ROOT)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sere-ray bench step-tim --out x", ["lane one", "step-tim"]),
        ("sere-ray bench step-time --out x --model qwen9", ["--model", "qwen9"]),
        ("sere-ray bench step-time", ["--out"]),
        ("pytest tests/no_such_folder", ["no such file"]),
        ("rm -rf x", ["'rm -rf x'", "sere-ray, pytest, python"]),
    ],
)
def test_commands_that_would_fail(tmp_path, command, words, has_words):
    with pytest.raises(SereError) as error:
        check_commands(plan_of(tmp_path, one=[command]), COMMAND_LINE, ROOT)
    has_words(str(error.value), *words)


def test_mistakes_in_a_plan(tmp_path):
    with pytest.raises(SereError, match=r"lanes.gpus: each of 0 to 0 at most once, here \[0, 1\]"):
        plan_of(tmp_path, gpus=1, one=["pytest"], two=["pytest"])
    (tmp_path / "bad.yaml").write_text("gpus: 1\nlanes: []\nminutes: 3\n")
    with pytest.raises(SereError, match=r"bad\.yaml.*minutes"):
        read_plan(tmp_path / "bad.yaml")


def test_lanes_run_side_by_side_and_a_failure_ends_no_lane(tmp_path):
    meet = (
        "import pathlib, sys, time; here = pathlib.Path(sys.argv[2]); here.touch(); "
        "end = time.time() + 20; other = pathlib.Path(sys.argv[1]); "
        "[time.sleep(.05) for _ in iter(lambda: other.exists() or time.time() > end, True)]; "
        "sys.exit(not other.exists())"
    )
    gpu = 'import os; print("GPU", os.environ["CUDA_VISIBLE_DEVICES"])'
    plan = plan_of(
        tmp_path,
        one=[python("raise SystemExit(3)"), f"{python(meet)} {{out}}/b {{out}}/a"],
        two=[f"{python(meet)} {{out}}/a {{out}}/b", python(gpu)],
    )
    out, archive = tmp_path / "out", tmp_path / "all.tgz"
    rows = run_host(plan, out, minutes=1, archive=archive, console=Console(quiet=True))
    assert sorted((row["lane"], row["code"]) for row in rows) == [
        ("one", 0), ("one", 3), ("two", 0), ("two", 0),
    ]  # fmt: skip
    assert (out / "two-1.log").read_text() == "GPU 1\n"
    assert json.loads((out / "host.json").read_text())["rows"] == rows
    with tarfile.open(archive) as packed:
        assert {"out/host.json", "out/two-1.log", "out/a"} <= set(packed.getnames())


def test_at_the_end_of_the_time_all_is_ended_and_what_there_is_stays(tmp_path):
    code = 'import sys, time; open(sys.argv[1], "w").write("kept"); time.sleep(1000)'
    plan = plan_of(tmp_path, one=[f"{python(code)} {{out}}/r", python("print(1)")])
    out, start = tmp_path / "out", time.monotonic()
    rows = run_host(plan, out, minutes=0.05, archive=None, console=Console(quiet=True))
    assert time.monotonic() - start < 20
    assert [row["code"] for row in rows] == [None]
    assert (out / "r").read_text() == "kept"


def test_a_command_that_hangs_says_where_and_the_lane_goes_on(tmp_path):
    wait = python("import time; time.sleep(600)")
    plan = plan_of(tmp_path, one=[wait, python("print(1)")])
    lane = plan.lanes[0].model_copy(update={"minutes_each": 0.02})
    plan = plan.model_copy(update={"lanes": (lane,)})
    start, out = time.monotonic(), tmp_path / "out"
    rows = run_host(plan, out, minutes=1, archive=None, console=Console(quiet=True))
    assert time.monotonic() - start < 30
    assert rows[0]["code"] is None
    assert "most recent call first" in (out / "one-0.log").read_text()
    assert "<string>" in (out / "one-0.log").read_text()
    assert rows[1]["command"] == plan.lanes[0].commands[1]
