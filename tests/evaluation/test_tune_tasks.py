"""`sere-ray tune --max-task-loss`: tasks decide, KL is a gate; and what is refused."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from sere_ray import assets
from sere_ray.cli.common import share
from sere_ray.cli.main import app
from sere_ray.evaluation.budget import Budget
from sere_ray.evaluation.task_rows import loss_end
from sere_ray.policy.policy import Policy
from sere_ray.util.errors import SereError

DATA = str(assets.CALIBRATION)
HELD_OUT = str(assets.CALIBRATION.with_name("heldout.jsonl"))
SMALL = ["--sequences", "16", "--length", "24", "--prompt", "12", "--batches", "8"]


@pytest.fixture
def tuned(similarity, tmp_path):
    """Runs the command; the result, the policy, the report."""

    def run(*arguments):
        out, report = tmp_path / "policy.yaml", tmp_path / "report.json"
        files = ["--out", str(out), "--report", str(report), "--device", "cpu"]
        where = ["--similarity", similarity, "--data", DATA, "--check", HELD_OUT]
        done = CliRunner().invoke(
            app, ["tune", str(assets.MODEL), *where, *files, *SMALL, *map(str, arguments)]
        )
        if done.exit_code:
            assert not out.exists()
            return done, None, None
        return done, yaml.safe_load(out.read_text()), json.loads(report.read_text())

    return run


SUMS = ["--tasks", "arithmetic", "--most-items", "64", "--rules", "sere"]


def test_tasks_reject_what_kl_lets_through(tuned):
    """S = 1 passes a wide gate, but half of the sums are wrong with it."""
    done, by_kl, _ = tuned("--max-kl", "1", "--rules", "sere")
    assert done.exit_code == 0, done.output
    done, by_tasks, report = tuned("--max-kl", "1", "--max-task-loss", "30%", *SUMS)
    assert done.exit_code == 0, done.output
    assert by_kl["select_top_k"] == 1
    assert by_tasks["select_top_k"] > 1
    assert Policy.parse(by_tasks).rule == "sere"
    said = " ".join(done.output.split())
    assert "sere, " in said
    assert "arithmetic at 8 rows loses" in said
    assert "too much" in said
    assert "keeps the budget of tasks" in said
    assert report["budget"] == {"kl": 1.0, "task_loss": 0.3}
    (predicted,), (checked,) = report["tasks_predicted"], report["tasks_checked"]
    assert loss_end(predicted) <= 0.3
    assert predicted["lost"] != checked["lost"] or predicted["right"] != checked["right"], (
        "the second text has other sums"
    )
    assert report["keeps_the_budget_on_the_second_text"] == (loss_end(checked) <= 0.3)
    assert "worst on the second text: arithmetic" in said


def test_the_gate_is_told_where_nobody_gives_one(tuned):
    arguments = ["--tasks", "continuation", "--most-items", "64", "--rules", "sere"]
    done, _, report = tuned("--max-task-loss", "0.9", *arguments)
    assert done.exit_code == 0, done.output
    assert report["budget"] == {"kl": 0.1, "task_loss": 0.9}
    assert report["predicted"][0]["kl_mean_95"][1] <= 0.1, "the gate holds"


def test_too_few_items_are_named_as_the_reason(tuned, has_words):
    done, _, _ = tuned("--max-kl", "1", "--max-task-loss", "1%", *SUMS)
    assert done.exit_code == 2
    has_words(
        " ".join(done.output.split()),
        *("no setting of sere keeps", "nearest: arithmetic at 8 rows loses", "+-0.50% takes some"),
        "a higher --most-items",
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-task-loss", "little"], ["--max-task-loss = 'little'", "such as 1% or 0.01"]),
        (["--max-task-loss", "0"], ["--max-task-loss = 0: must be at least 0.1%"]),
        (["--max-task-loss", "100%"], ["--max-task-loss = 1: must be", "below 100%"]),
        (["--max-task-loss", "1%", "--tasks", "chess"], ["--tasks: 'chess' is none of cloze"]),
        (
            ["--max-task-loss", "1%", "--max-kl", "0.1", "--min-agreement", "0.9"],
            ["--max-kl, --min-agreement: give one of the two"],
        ),
    ],
)
def test_bad_input_is_refused(tuned, has_words, options, words):
    done, _, _ = tuned(*options)
    assert done.exit_code == 2
    has_words(" ".join(done.output.split()), *words)


def test_a_gate_closes_towards_the_exact_model():
    assert Budget(0.2, None).tightened(0.5) == Budget(0.1, None)
    closed = Budget(None, 0.9).tightened(0.5)
    assert closed.agreement == pytest.approx(0.95)
    assert Budget(None, 0.9).tightened(1.0).agreement == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("text", "value"), [("1%", 0.01), ("0.01", 0.01), (" 2.5 % ", 0.025), ("100%", 1.0)]
)
def test_shares(text, value):
    assert share("--x", text) == pytest.approx(value)


def test_other_words_are_no_shares():
    for text in ("", "%", "1%%", "one"):
        with pytest.raises(SereError, match=r"--x = .*: must be a share"):
            share("--x", text)
