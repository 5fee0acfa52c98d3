"""Training on the demo model: it drops slots, goes on where it was killed, and what it refuses."""

import json

import pytest
import torch
from transformers import Qwen3Config
from typer.testing import CliRunner

from sere_ray import assets
from sere_ray.calibration.loading import load_model
from sere_ray.cli.main import app
from sere_ray.masks import train, training
from sere_ray.masks.artifact import MasksArtifact
from sere_ray.masks.frozen_model import FrozenModel
from sere_ray.masks.plan import TrainSettings, prepare_training
from sere_ray.util.errors import SereError
from sere_ray.util.results import load_result
from tests.masks.conftest import SMALL

MODEL, DATA = str(assets.MODEL), str(assets.CALIBRATION)
OPTIONS = ["--steps", "2", "--batch-size", "8", "--batch", "8", "--sequences", "16"]
OPTIONS += ["--validation", "8", "--length", "16", "--device", "cpu"]


def command(out, *options, model=MODEL, data=DATA):
    arguments = ["train-masks", model, "--data", data, "--out", str(out), *OPTIONS, *options]
    return CliRunner().invoke(app, arguments)


def test_levels_drop_more_and_more(trained):
    path, found = trained
    ends = [row for row in found.history if row["step"] == SMALL["steps"]]
    first, last = ends
    assert 1 > first["slots_kept"] > last["slots_kept"] > 0
    assert first["experts_kept"] > last["experts_kept"]
    assert min(first["kl_mean"], last["kl_mean"]) > 0
    assert len(last["slots_kept_by_layer"]) == len(last["experts_kept_by_layer"]) == 4
    assert len(found.history) == 2 * training.VALIDATIONS
    written = MasksArtifact.load(path)
    assert [level.knob for level in written.metadata.levels] == [0.5, 2.0]
    assert [level.slots_kept for level in written.metadata.levels] == [
        row["slots_kept"] for row in ends
    ]
    assert written.metadata.dataset_sha256
    assert not path.with_name(f"{path.name}.work").exists()


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, revision=None, device=torch.device("cpu"), dtype=torch.float32)


def test_nothing_is_masked_at_the_start_and_only_masks_have_gradients(model):
    frozen = FrozenModel(model, TrainSettings(**SMALL))
    windows = torch.arange(3, 3 + 8 * 16).view(8, 16)
    start = frozen.validate(windows)
    assert start.kl_mean == pytest.approx(0, abs=1e-6)
    assert (start.slots_mean, start.experts_mean) == (1, pytest.approx(1, abs=1e-3))
    assert frozen.add_gradients(windows, 1.0) == pytest.approx(0, abs=1e-6)
    assert all(router.grad.abs().sum() > 0 for router in frozen.routers.values())
    assert all(weight.grad is None for weight in model.parameters())


def test_gradients_of_workers_add_up(model):
    """The seam for several workers: halves of a step give the mean of their gradients."""
    settings = TrainSettings(**{**SMALL, "batch": 4})
    windows = prepare_training(settings, assets.DATA / "none").training[:8]

    def gradients(*parts):
        frozen = FrozenModel(model, settings)
        frozen.set_routers({i: 0.01 * torch.ones_like(r) for i, r in frozen.routers.items()})
        for part in parts:
            frozen.add_gradients(part, 1.0)
        return [router.grad / len(parts) for router in frozen.routers.values()]

    for whole, halves in zip(gradients(windows), gradients(*windows.split(4)), strict=True):
        assert torch.allclose(whole, halves, atol=1e-5)


@pytest.mark.parametrize("penalty", ["rows", "batch"])
def test_first_choices_stay(penalty, tmp_path):
    """A penalty that drops nearly all leaves one slot of four."""
    settings = {**SMALL, "knobs": (50.0,), "penalty": penalty, "keep_first": True, "steps": 16}
    found = train.train_masks(TrainSettings(**settings), tmp_path / "masks")
    assert 0.25 <= found.history[-1]["slots_kept"] < 0.5
    none = train.train_masks(TrainSettings(**{**settings, "keep_first": False}), tmp_path / "masks")
    assert none.history[-1]["slots_kept"] < 0.25


def test_a_killed_job_goes_on_to_the_same_masks(trained, tmp_path, monkeypatch):
    path, _ = trained
    out = tmp_path / "killed" / "masks.safetensors"
    out.parent.mkdir()
    monkeypatch.setattr(training.Training, "save_seconds", -1.0)
    add_gradients, steps = FrozenModel.add_gradients, []

    def killed_at(numbers):
        def step(self, *arguments):
            steps.append(0)
            if len(steps) in numbers:
                raise KeyboardInterrupt
            return add_gradients(self, *arguments)

        return step

    # In the first level, at the first step of the second one, and within that.
    monkeypatch.setattr(FrozenModel, "add_gradients", killed_at((6, 10, 15)))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train.train_masks(TrainSettings(**SMALL), out)
        assert not out.exists()
    with pytest.raises(SereError, match=r"with steps = 8, this one has 9; remove the folder"):
        train.train_masks(TrainSettings(**{**SMALL, "steps": 9}), out)
    found = train.train_masks(TrainSettings(**SMALL), out)
    assert len(steps) == 2 * SMALL["steps"] + 3, "what was done is not done again"
    assert len(found.history) == 2 * training.VALIDATIONS
    ours, theirs = MasksArtifact.load(out), MasksArtifact.load(path)
    assert ours.metadata.levels == theirs.metadata.levels
    for level, of_level in theirs.weights.items():
        for layer, weight in of_level.items():
            assert torch.equal(ours.weights[level][layer], weight)
    assert list(out.parent.iterdir()) == [out]


def test_damaged_state(tmp_path, has_words):
    work = tmp_path / "masks.work"
    work.mkdir()
    (work / "state.safetensors").write_bytes(b"half")
    done = command(tmp_path / "masks")
    assert done.exit_code == 2
    has_words(done.stderr, "damaged", "remove it")
    (work / "state.safetensors").rename(work / "other")
    done = command(tmp_path / "masks")
    assert done.exit_code == 2
    has_words(done.stderr, str(work), "is no training's")


def test_command(tmp_path, has_words):
    out, report = tmp_path / "masks.safetensors", tmp_path / "report.json"
    page = tmp_path / "page.html"
    options = ["--knob", "0.1", "--balance", "0.01", "--report", str(report), "--html", str(page)]
    done = command(out, *options)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out)
    has_words(done.stderr, "level 1, step 2: KL", "slots by layer", "2 of 2 steps", "s left")
    document = load_result(report)
    assert (document["model"], document["data"]) == ("model", "calibration.jsonl")
    assert [row["step"] for row in document["rows"]] == [1, 2]
    assert json.loads(json.dumps(document["settings"]))["balance"] == 0.01
    has_words(
        page.read_text(), "Masks of model", "data:image/svg+xml", "calibration.jsonl", "KL, nats"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--knob", "much"], "--knob = 'much': must be numbers above 0"),
        (["--knob", "0,1"], "--knob = 0,1: must be numbers above 0, at most 100"),
        (["--knob", "nan"], "--knob = nan: must be numbers above 0, at most 100"),
        (["--knob", "2,1"], "--knob = 2,1: must grow"),
        (["--balance", "-1"], "--balance = -1.0: must be 0..100"),
        (["--learning-rate", "2"], "--learning-rate = 2.0: must be above 0, at most 1"),
        (["--batch", "3"], "--batch = 3: must divide --batch-size = 8 and --validation = 8"),
        (["--validation", "16"], "leaves 0 windows, but a step takes --batch-size = 8"),
        (["--sequences", "1000000"], "sequences = 1000000; give more text"),
        (["--text-column", "body"], "no column 'body'"),
        (["--length", "5000"], "length = 5000: the model reads at most 1024 tokens"),
        (["--workers", "2"], "--workers = 2: each must have an equal part of --batch-size = 8"),
        (["--sync", "edit"], "--sync edit: is for several workers; give --workers"),
        (["--device", "tpu"], "device = 'tpu': not usable"),
    ],
)
def test_bad_input(options, message, tmp_path):
    out = tmp_path / "masks"
    out.write_bytes(b"of an earlier training")
    done = command(out, *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"of an earlier training"


def test_a_model_without_experts(tmp_path):
    dense = tmp_path / "dense"
    Qwen3Config(num_hidden_layers=1, architectures=["Qwen3ForCausalLM"]).save_pretrained(dense)
    done = command(tmp_path / "masks", model=str(dense))
    assert done.exit_code == 2
    assert "no MoE layer found" in done.stderr


def test_short_text(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    done = command(tmp_path / "masks", data=str(text))
    assert done.exit_code == 2
    assert "the text gives 1 windows" in done.stderr


def cuda_full(self, windows):
    raise torch.OutOfMemoryError


def cpu_full(self, windows):
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("full", [cuda_full, cpu_full])
def test_no_memory(full, tmp_path, monkeypatch):
    monkeypatch.setattr(FrozenModel, "_exact", full)
    done = command(tmp_path / "masks")
    assert done.exit_code == 2
    assert "--batch-size = 8: the device has not memory enough" in done.stderr
    assert not (tmp_path / "masks").exists()
