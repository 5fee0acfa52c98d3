"""What `sere-ray bench rank-time` fits."""

import json
from pathlib import Path

import pytest

from sere_ray.bench.rank_time import fit_rank_times
from sere_ray.util.errors import SereError

RESULTS = Path(__file__).parents[2] / "docs" / "results"
MODEL = "made: 10 layers x 64 experts, top-8, 1 GB, random weights"


def write(folder, rows):
    path = folder / "steps.json"
    header = {"command": "", "machine": {}}
    path.write_text(json.dumps({**header, "rows": rows}))
    return path


def row(arm, experts, ms, **more):
    return {"model": MODEL, "arm": arm, "batch": 16, "experts_read": experts, "step_ms": ms} | more


def test_finds_the_line_that_steps_were_made_of(tmp_path):
    """2 ms and 3 us for each expert of each of ten layers; stock is no point of it."""
    rows = [row("S=1", read, 2 + 0.03 * read) for read in (5.0, 10.0, 20.0, 40.0)]
    (found,) = fit_rank_times([write(tmp_path, [*rows, row("stock, triton", 40.0, 9.0)])])
    assert found["base_ms"] == 2.0
    assert found["expert_us"] == 3.0
    assert (found["ranks"], found["rows"], found["points"]) == (1, 16, 4)
    assert found["worst_error"] < 1e-6


def test_several_ranks_wait_for_the_busiest(tmp_path):
    of_ranks = {"data_parallel_size": 2, "rows_per_rank": 8}
    rows = [
        row("S=1", 5.0, 1 + 0.02 * most, experts_read_max_rank=most, **of_ranks)
        for most in (6.0, 9.0, 13.0, 30.0)
    ]
    (found,) = fit_rank_times([write(tmp_path, rows)])
    assert (found["ranks"], found["rows"]) == (2, 8)
    assert found["expert_us"] == 2.0
    assert found["experts"] == [6.0, 30.0]


def test_refuses_too_few_points_and_other_files(tmp_path):
    few = write(tmp_path, [row("S=1", read, 2.0) for read in (5.0, 10.0, 10.0)])
    with pytest.raises(SereError, match="no model was measured at 4 numbers of experts read"):
        fit_rank_times([few])
    with pytest.raises(SereError, match="no result of `sere-ray bench step-time`"):
        fit_rank_times([RESULTS / "kernel-h200.json"])


def test_the_committed_fit_is_of_the_committed_steps():
    committed = json.loads((RESULTS / "rank-time-h200.json").read_text())
    names = ["step-time-h200", "step-time-formats-h200", "expert-parallel-h200x2"]
    names.append("expert-parallel-h200x4")
    assert committed["rows"] == fit_rank_times([RESULTS / f"{name}.json" for name in names])
