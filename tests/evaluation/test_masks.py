"""`sere-ray evaluate` and `tasks` with masks before a rule, and what they refuse."""

import pytest
import torch
import yaml
from typer.testing import CliRunner

from sere_ray import assets
from sere_ray.cli.main import app
from sere_ray.masks.artifact import MasksArtifact
from sere_ray.masks.plan import TrainSettings
from sere_ray.masks.train import train_masks
from sere_ray.util.results import load_result
from tests.masks.conftest import SMALL

HELD_OUT = str(assets.CALIBRATION.with_name("heldout.jsonl"))


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Light and heavy masks, and a level that keeps everything."""
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    trained = train_masks(TrainSettings(**SMALL), path).artifact
    levels = [*trained.metadata.levels, trained.metadata.levels[0]]
    zero = {layer: torch.zeros_like(weight) for layer, weight in trained.weights[1].items()}
    metadata = trained.metadata.model_copy(update={"levels": levels})
    MasksArtifact({**trained.weights, 3: zero}, metadata).save(path)
    return str(path)


def run(command, similarity, settings, tmp_path, *options):
    listed = tmp_path / "settings.yaml"
    listed.write_text(yaml.safe_dump(settings))
    out = tmp_path / "out.json"
    arguments = [command, str(assets.MODEL), "--similarity", similarity, "--data", HELD_OUT]
    arguments += ["--settings", str(listed), "--device", "cpu", "--out", str(out), *options]
    done = CliRunner().invoke(app, arguments)
    return done, out


def evaluate(similarity, settings, tmp_path):
    size = ["--sequences", "16", "--length", "24", "--prompt", "12", "--ranks", "1"]
    return run("evaluate", similarity, settings, tmp_path, "--batches", "1,8", *size)


def test_frontier(similarity, masks, tmp_path):
    margin = {"rule": "margin", "tau": 0.01}
    settings = [
        margin,
        *({"rule": "none", "masks": masks, "level": level} for level in (1, 2, 3)),
        *({**margin, "masks": masks, "level": level} for level in (1, 3)),
        {"rule": "sere", "select_top_k": 2, "masks": masks, "level": 1},
        {"rule": "sere", "select_top_k": 1},
    ]
    done, out = evaluate(similarity, settings, tmp_path)
    assert done.exit_code == 0, done.output
    rows = {(row["rule"], row["level"], row["batch"]): row for row in load_result(out)["rows"]}
    assert load_result(out)["comparison"] == [], "masks are no peer of rules without training"
    for batch in (1, 8):
        exact, first, second, zero = (
            rows[key, level, batch]
            for key, level in (("exact", None), ("none", 1), ("none", 2), ("none", 3))
        )
        assert exact["expert_rows_share"] == zero["expert_rows_share"] == 1
        assert (zero["kl_mean"], zero["experts_read_mean"]) == (0, exact["experts_read_mean"])
        assert 1 > first["expert_rows_share"] > second["expert_rows_share"] > 0
        assert exact["experts_read_mean"] > first["experts_read_mean"]
        assert first["kl_mean"] > 0
        alone, both = rows["margin", None, batch], rows["margin", 1, batch]
        assert both["expert_rows_share"] <= first["expert_rows_share"]
        assert both["experts_read_mean"] <= first["experts_read_mean"]
        same = rows["margin", 3, batch]
        for field in ("kl_mean", "experts_read_mean"):
            assert same[field] == pytest.approx(alone[field], rel=1e-4, abs=1e-7)
    assert rows["none", 1, 1]["kl_mean"] == pytest.approx(rows["none", 1, 8]["kl_mean"], rel=1e-3)
    assert rows["none", 1, 1]["experts_read_mean"] == pytest.approx(
        4 * rows["none", 1, 1]["expert_rows_share"], rel=1e-3
    ), "a lone row reads what it computes"


def test_tasks(similarity, masks, tmp_path):
    settings = [{"rule": "none", "masks": masks, "level": 1}]
    options = ["--tasks", "copying", "--batches", "4", "--most-items", "8", "--half-width", "0.3"]
    done, out = run("tasks", similarity, settings, tmp_path, *options)
    assert done.exit_code == 0, done.output
    (row,) = load_result(out)["rows"]
    assert row["level"] == 1
    assert 0 < row["expert_rows_share"] < 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rule": "none", "masks": "MASKS"}, "level is missing"),
        ({"rule": "none", "level": 1}, "level = 1: is one of masks"),
        ({"rule": "none", "masks": "MASKS", "level": -1}, "greater than or equal to 0"),
        ({"rule": "none", "masks": "MASKS", "level": 4}, "level = 4"),
        ({"rule": "lynx", "experts": 9, "masks": "MASKS", "level": 1}, "not with 'lynx'"),
        ({"rule": "none", "masks": "gone", "level": 1}, "masks = 'gone': no such file"),
        ({"rule": "none"}, "rule = 'none': changes nothing by itself; give masks and level"),
        ({"rule": "none", "tau": 0.1}, "tau = 0.1: rule 'none' has no such key"),
    ],
)
def test_refusals(keys, message, similarity, masks, tmp_path):
    keys = {key: masks if value == "MASKS" else value for key, value in keys.items()}
    done, out = evaluate(similarity, [keys], tmp_path)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not out.exists()


def test_none_has_no_grid(similarity, tmp_path):
    text = ["--similarity", similarity, "--data", HELD_OUT, "--out", str(tmp_path / "out.json")]
    done = CliRunner().invoke(app, ["evaluate", str(assets.MODEL), "--rules", "none", *text])
    assert done.exit_code == 2
    assert "--rules: 'none' has no settings of its own; name it in --settings" in done.stderr


def test_masks_of_another_model(similarity, masks, tmp_path):
    found = MasksArtifact.load(masks)
    prints = dict(found.metadata.router_fingerprint) | {2: "0" * 32}
    other = tmp_path / "other.safetensors"
    metadata = found.metadata.model_copy(update={"router_fingerprint": prints})
    MasksArtifact(found.weights, metadata).save(other)
    keys = {"rule": "none", "masks": str(other), "level": 1}
    done, _ = evaluate(similarity, [keys], tmp_path)
    assert done.exit_code == 2
    assert "router fingerprint of layer 2 is 0000" in done.stderr
