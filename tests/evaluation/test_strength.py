"""`sere-ray strength`: what `loss` means, measured on the demo model and kept in its artifact."""

import json
import shutil
from itertools import islice

import numpy as np
import pytest
from typer.testing import CliRunner

from sere_ray import assets
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.cli.main import app
from sere_ray.evaluation.evaluator import EvaluationPlan, Evaluator
from sere_ray.evaluation.paired import Paired
from sere_ray.evaluation.strength_answers import Answers, AskedTask, Asking, ask_in_turns
from sere_ray.evaluation.strength_law import PowerLaw, fit
from sere_ray.evaluation.task_items import TASKS
from sere_ray.evaluation.task_run import Measurement, TaskPlan
from sere_ray.evaluation.tasks import answered, open_questions

DATA = str(assets.CALIBRATION)
SMALL = ["--sequences", "8", "--rows", "4,8", "--most-items", "100"]


@pytest.fixture
def artifact(similarity, tmp_path):
    return shutil.copy(similarity, tmp_path / "demo.safetensors")


def plan_of(artifact):
    return EvaluationPlan(
        model=str(assets.MODEL),
        similarity=artifact,
        data=DATA,
        text_column="text",
        sequences=8,
        length=128,
        prompt_tokens=64,
        batches=(8,),
        ranks=(1,),
        device="cpu",
    )


@pytest.fixture(scope="module")
def evaluator(similarity):
    return Evaluator(plan_of(similarity))


def run(artifact, *arguments):
    files = ["--similarity", str(artifact), "--data", DATA, "--device", "cpu"]
    return CliRunner().invoke(
        app, ["strength", str(assets.MODEL), *files, *SMALL, *map(str, arguments)]
    )


def row(task, kl, loss, right=10_000, won=50):
    return {
        "task": task,
        "kl": kl,
        "lost": round(loss * right) + won,
        "won": won,
        "right_exact": right,
    }


def test_a_law_is_found_again():
    laws = {"a": PowerLaw(0.5, 1.0), "b": PowerLaw(0.2, 0.45)}
    rows = [row(task, kl, law.at(kl)) for task, law in laws.items() for kl in (0.004, 0.03, 0.2)]
    for task, found in fit(rows).items():
        for kl in (0.01, 0.1):
            assert found.at(kl) == pytest.approx(laws[task].at(kl), rel=0.05)


def test_a_task_that_loses_nothing_or_says_nothing_has_no_law():
    assert fit([row("same", kl, 0.0) for kl in (0.004, 0.2)]) == {}
    assert fit([row("few", kl, 0.5, right=99, won=0) for kl in (0.004, 0.2)]) == {}


class Told(AskedTask):
    """A task of one setting whose passes are told: of 400 items each, so many lost and won."""

    def __init__(self, lost, won):
        self.answers = self.to_the_end = [Answers(Asking({"rule": "margin", "tau": 0.1}, 8))]
        self.items = self.texts = 0
        self.ended_by, self.lost, self.won = None, lost, won

    def ask(self):
        exact, rule = (np.ones(400, dtype=bool) for _ in range(2))
        rule[: self.lost] = False
        rule[-self.won :] = True
        exact[-self.won :] = False
        self.answers[0].parts.append(Paired(exact, rule, np.arange(400)))
        self.items += 400
        self.texts += 400


def test_tasks_are_asked_until_the_worst_is_known():
    worst, mild = Told(lost=40, won=4), Told(lost=8, won=6)
    unclear = Told(lost=5, won=5)
    ask_in_turns([worst, mild], 0.15, 8000, None, "")
    assert (worst.ended_by, mild.ended_by) == ("precision", "not_worst")
    assert mild.items < worst.items < 8000
    loss = worst.strongest()
    assert loss.high - loss.value < 0.15 * loss.value
    ask_in_turns([unclear], 0.15, 2000, None, "")
    assert (unclear.ended_by, unclear.items) == ("most_items", 2000)


def test_answers_are_asked_in_one_pass(evaluator):
    """As `tasks` would answer; KL is that of the rows that answer, and nothing where exact."""
    ask = open_questions(evaluator.plan, DATA, {"arithmetic": TASKS["arithmetic"]})["arithmetic"]
    light, strong = (Asking({"rule": "margin", "tau": tau}, 8) for tau in (0.0, 1.0))
    task = AskedTask(evaluator, "arithmetic", TASKS["arithmetic"], ask(), [light, strong], [strong])
    task.ask()
    by_tau = {row["settings"]["tau"]: row for row in task.rows()}
    assert abs(by_tau[0.0]["kl"]) < 1e-5
    assert by_tau[1.0]["kl"] > 1e-3
    measurement = Measurement(evaluator, TASKS["arithmetic"], 8)
    (expected,) = answered(
        "arithmetic", measurement, islice(ask(), 64), [strong.keys], TaskPlan((), 0.1), None, ""
    )
    for name in ("items", "right", "right_exact", "lost", "won", "experts_read_mean"):
        assert by_tau[1.0][name] == expected[name]


def test_the_artifact_says_what_a_loss_is(artifact, tmp_path):
    """On sums, of which the demo model gets nearly all right and soon loses some."""
    before, out = SimilarityArtifact.load(artifact), tmp_path / "strength.json"
    done = run(artifact, "--tasks", "arithmetic", "--out", out)
    assert done.exit_code == 0, done.output
    after = SimilarityArtifact.load(artifact)
    strength = after.metadata.strengths["margin"]
    assert [curve.rows for curve in strength.curves] == [4, 8]
    assert strength.tasks == ("arithmetic",)
    assert all(len(most) == len(before.layers) for c in strength.curves for most in c.most)
    assert all((after.layers[i] == before.layers[i]).all() for i in before.layers)
    low, high = strength.range
    loss = (low * high) ** 0.5
    rows = json.loads(out.read_text())["rows"]
    assert {row["batch"] for row in rows} == {4, 8}
    assert {row["batch"] for row in rows if row["to_the_end"]} == {8}
    for batch in (4, 8):
        kl = [row["kl"] for row in rows if row["batch"] == batch]
        assert len(kl) > 3
        assert kl[-1] > 3 * kl[len(kl) // 2] > 9 * kl[0], "a stronger tau changes more"

    evaluator = Evaluator(plan_of(artifact))
    bound = evaluator.bind({"rule": "margin", "loss": loss})
    (chunk,) = evaluator.chunks(evaluator.input_ids, 8)
    reads = chunk.measure(bound, 8).reads.mean()
    assert reads < chunk.measure(evaluator.bind({"rule": "margin", "tau": 0.0}), 8).reads.mean()
    # No step of this text gives up more than the most that is between what steps gave up.
    strongest = evaluator.bind({"rule": "margin", "loss": high})
    assert chunk.most_given_up(strongest, 8) == list(strength.curves[-1].most[-1])


def test_what_cannot_be_measured(artifact, has_words):
    for arguments, words in (
        (["--rules", "sere"], ["--rules", "'sere'", "margin"]),
        (["--tasks", "poems"], ["--tasks", "'poems'"]),
        (["--rows", "1"], ["--rows"]),
        (["--tasks", "cloze", "--most-items", "100"], ["no task lost", "--most-items"]),
    ):
        done = run(artifact, *arguments)
        assert done.exit_code == 2, done.output
        has_words(done.output.replace("\n", " "), *words)
