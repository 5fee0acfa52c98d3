"""The expert-parallel benchmark: its rows, its refusals, and itself on two CPU ranks."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from sere_ray.bench import expert_parallel
from sere_ray.bench.expert_parallel import arms, result_rows, run_expert_parallel
from sere_ray.bench.models import get_model
from sere_ray.bench.rank_engines import RankPlan
from sere_ray.util.errors import SereError

OPTIONS = {
    "layers": None,
    "num_ranks": 2,
    "ways": ("global", "local"),
    "rows": [2],
    "repeats": 1,
    "tokens": 4,
    "routers": ("uniform",),
    "chosen": ("S=1",),
    "compiled": False,
    "append": False,
    "profile": None,
    "profile_rows": 2,
    "console": Console(quiet=True),
}


def counters(slots, before, read, busiest_before, busiest_read, steps=2):
    gathered = {
        "steps": steps,
        "experts_before": before,
        "experts_read": read,
        "busiest_before": busiest_before,
        "busiest_read": busiest_read,
    }
    decode = {"steps": steps, "slots_rerouted": slots}
    return {"decode_only": decode, "gathered": {"decode_only": gathered}}


def test_rows_are_of_the_slowest_rank_and_of_all_slots(tmp_path):
    plan = RankPlan(
        model=get_model("demo"),
        folder=tmp_path,
        similarity="f",
        ways=("global",),
        rows=[8],
        arms={"stock": None, "S=1": {}},
        repeats=3,
        tokens=4,
        routers=["uniform"],
        ports=[1, 2],
        compiled=True,
        num_ranks=2,
    )
    seen = counters([0, 0], [40, 60], [20, 40], [24, 36], [14, 26])
    ranks = []
    for slots, stock, own in (
        ([6, 10], [4.0, 5.0, 6.0], [2, 2, 2]),
        ([2, 2], [5, 4, 4], [1, 3, 1]),
    ):
        mine = counters(slots, [40, 60], [20, 40], [24, 36], [14, 26])
        ranks.append(
            {
                "router": "uniform",
                "rows": 8,
                "ms": {(None, "stock"): stock, ("global", "S=1"): own},
                "counters": {("global", "S=1"): mine, ("global", "observe"): seen},
            }
        )
    stock, rerouted = result_rows(plan, ranks)
    assert stock["step_ms"] == rerouted["stock_step_ms"] == 5.0
    assert (stock["union"], rerouted["union"]) == (None, "global")
    assert rerouted["step_ms"] == 2
    assert rerouted["speedup"] == 2.5  # of 5 / 2, 5 / 3, 6 / 2
    assert rerouted["slots_rerouted"] == 20 / 2 / 2
    assert (stock["experts_read"], stock["experts_read_max_rank"]) == (12.5, 15)
    assert (rerouted["experts_read"], rerouted["experts_read_max_rank"]) == (7.5, 10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ways": ("best",)}, "--union: 'best' is none of global, local, before-dispatch"),
        ({"chosen": ("S=3",)}, "--arms: 'S=3' is none of stock, S=4"),
        ({"routers": ("odd",)}, "--router: 'odd' is none of uniform, skewed"),
        ({"profile": Path("kernels.json")}, "--profile: needs a GPU"),
    ],
)
def test_refusals(tmp_path, changes, words):
    with pytest.raises(SereError, match=words):
        run_expert_parallel("demo", tmp_path / "out.json", **{**OPTIONS, **changes})
    assert not (tmp_path / "out.json").exists()


def test_a_rank_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(expert_parallel, "free_ports", lambda count, apart: [])
    with pytest.raises(SereError, match=r"rank [01] failed:\n(?s:.*)zip"):
        run_expert_parallel("demo", tmp_path / "out.json", **OPTIONS)


@pytest.mark.engine
def test_two_ranks_of_a_cpu(tmp_path):
    out = tmp_path / "out.json"
    run_expert_parallel("demo", out, **OPTIONS)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["union"], row["arm"]) for row in rows] == [
        (None, "stock"),
        ("global", "S=1"),
        ("local", "S=1"),
    ]
    assert all(row["step_ms"] > 0 and row["rows_per_rank"] == 2 for row in rows)
    assert rows[0]["slots_rerouted"] == 0 < rows[1]["slots_rerouted"]
    assert list(arms(8)) == ["stock", "S=8", "S=2", "S=1", "S=1 rho=0.9"]
