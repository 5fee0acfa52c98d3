"""`sere-ray strength`: what `loss` means, measured on the demo model and kept in its artifact."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from sere_ray import assets
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.cli.main import app
from sere_ray.evaluation.evaluator import EvaluationPlan, Evaluator
from sere_ray.evaluation.strength import PowerLaw, fit

DATA = str(assets.CALIBRATION)
SMALL = ["--sequences", "8", "--rows", "4,8", "--most-items", "400"]


@pytest.fixture
def artifact(similarity, tmp_path):
    return shutil.copy(similarity, tmp_path / "demo.safetensors")


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
    assert [row["task"] for row in json.loads(out.read_text())["rows"]] == ["arithmetic"] * 3

    plan = EvaluationPlan(
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
    evaluator = Evaluator(plan)
    bound = evaluator.bind({"rule": "margin", "loss": loss})
    (chunk,) = evaluator.chunks(evaluator.input_ids, 8)
    reads = chunk.measure(bound, 8).reads.mean()
    assert reads < chunk.measure(evaluator.bind({"rule": "margin", "tau": 0.0}), 8).reads.mean()
    # No step of this text gives up more than the most that is between what steps gave up.
    strongest = evaluator.bind({"rule": "margin", "loss": high})
    _, most = chunk.strength(strongest, 8)
    assert most == list(strength.curves[-1].most[-1])


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
