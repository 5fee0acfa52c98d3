"""The whole way from a checkpoint and a text to a file, and every way it can fail."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.calibration import calibrate, plan, run, synthetic_artifact
from sere_ray.calibration.similarity import METRICS
from sere_ray.util.errors import ArtifactError, DataError, SereError
from sere_ray.util.files import file_sha256
from tests.models import ARCHITECTURES, MOE_LAYERS, NUM_EXPERTS, TOP_K, build_tokenizer

Checkpoint = Callable[[str], Path]


def quick(model: Path | str, text: Path | str, out: Path, **kwargs: Any) -> SimilarityArtifact:
    options = {"sequences": 4, "length": 32, "batch_size": 2, "device": "cpu"} | kwargs
    return calibrate(str(model), data=str(text), out=out, **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_writes_what_it_returns(
    name: str, checkpoint: Checkpoint, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.safetensors"
    returned = quick(checkpoint(name), text_file, out)
    loaded = SimilarityArtifact.load(out)
    assert loaded.metadata == returned.metadata
    assert sorted(loaded.layers) == list(MOE_LAYERS[name])
    for index, matrix in loaded.layers.items():
        assert torch.equal(matrix, returned.layers[index])
    metadata = loaded.metadata
    assert metadata.model_id == checkpoint(name).name
    assert metadata.architecture.endswith("ForCausalLM")
    assert (metadata.num_experts, metadata.top_k, metadata.tokens) == (NUM_EXPERTS, TOP_K, 128)
    assert metadata.dataset_sha256 == file_sha256(text_file)
    assert set(metadata.libraries) == {"sere-ray", "torch", "transformers"}
    assert list(tmp_path.iterdir()) == [out]
    weights = load_file(checkpoint(name) / "model.safetensors")
    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    for index in MOE_LAYERS[name]:
        gate = weights[f"model.layers.{index}.{block}.gate.weight"]
        loaded.check_router(index, gate, path=str(out))


def test_a_model_that_also_takes_images(text_file: Path, tmp_path: Path) -> None:
    """Its text part is calibrated; the artifact names the whole, as vLLM does."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    tokenizer = build_tokenizer()
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": len(tokenizer),
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    Qwen3VLMoeForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = quick(tmp_path / "model", text_file, tmp_path / "a")
    assert found.metadata.architecture == "Qwen3VLMoeForConditionalGeneration"
    assert (found.metadata.top_k, sorted(found.layers)) == (2, [0, 1])
    of_text_alone = "Qwen3VLMoeForCausalLM"
    found.check_model(architecture=of_text_alone, num_experts=8, top_k=2, path="a")
    with pytest.raises(ArtifactError, match="Qwen3VLMoeForConditionalGeneration"):
        found.check_model(architecture="Qwen3MoeForCausalLM", num_experts=8, top_k=2, path="a")


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric(metric: str, checkpoint: Checkpoint, text_file: Path, tmp_path: Path) -> None:
    artifact = quick(checkpoint("olmoe"), text_file, tmp_path / "a", metric=metric)
    assert artifact.metadata.metric == metric


def test_router_fingerprint_does_not_depend_on_dtype(
    checkpoint: Checkpoint, text_file: Path, tmp_path: Path
) -> None:
    found = [
        quick(checkpoint("qwen3_moe"), text_file, tmp_path / "a", dtype=dtype).metadata
        for dtype in ("auto", "float32")
    ]
    assert found[0].router_fingerprint == found[1].router_fingerprint


def test_a_failure_in_the_middle_leaves_the_old_file(
    checkpoint: Checkpoint, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.safetensors"
    out.write_text("old")

    def broken(*args: object, **kwargs: object) -> None:
        raise MemoryError

    for target in ("sere_ray.calibration.run.collect", "safetensors.torch.save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(target, broken)
            with pytest.raises(MemoryError):
                quick(checkpoint("olmoe"), text_file, out)
        assert out.read_text() == "old"
        assert list(tmp_path.iterdir()) == [out]


def test_output_is_checked_before_anything_is_loaded(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object) -> None:
        raise AssertionError("loaded too early")

    monkeypatch.setattr(plan, "load_config", unreachable)
    with pytest.raises(ArtifactError, match="the folder does not exist; create it"):
        quick("any", text_file, tmp_path / "no" / "a")
    with pytest.raises(ArtifactError, match="is a folder; give a file name"):
        quick("any", text_file, tmp_path)

    def read_only(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(ArtifactError, match=r"cannot be written \(Permission denied\)"):
        quick("any", text_file, tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "euclid"}, "metric = 'euclid'"),
        ({"device": "abacus"}, r"device = 'abacus': not usable.*allowed: auto, cpu"),
        ({"dtype": "int3"}, "dtype = 'int3': must be one of auto, bfloat16, float32"),
        ({"length": 4096}, "length = 4096: the model reads at most 2048 tokens"),
        ({"sequences": 10**6}, r"sequences = 1000000; give more text"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
    ],
)
def test_options_are_checked(
    options: dict[str, Any],
    message: str,
    checkpoint: Checkpoint,
    text_file: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(SereError, match=message) as caught:
        quick(checkpoint("olmoe"), text_file, tmp_path / "a", **options)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_exact_cka_is_refused_before_the_weights_are_loaded(
    checkpoint: Checkpoint, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sere_ray.calibration.similarity.EXACT_LIMIT_BYTES", 2**20)
    monkeypatch.delattr(run, "load_model")
    with pytest.raises(SereError, match="'cka-exact' would hold"):
        quick(checkpoint("olmoe"), text_file, tmp_path / "a", metric="cka-exact")


@pytest.mark.parametrize("kind", ["absent", "empty", "no_tokenizer", "no_weights", "hub"])
def test_unusable_models_are_one_line(
    kind: str,
    checkpoint: Checkpoint,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "model"
    if kind != "absent":
        folder.mkdir()
    if kind.startswith("no_"):
        leave_out = "tokenizer" if kind == "no_tokenizer" else "model"
        for file in checkpoint("qwen3_moe").iterdir():
            if not file.name.startswith(leave_out):
                shutil.copy(file, folder)
    message = {
        "absent": "no such folder",
        "empty": "has no config.json",
        "no_tokenizer": "tokenizer",
        "no_weights": "cannot load its weights",
        "hub": "cannot load its configuration",
    }[kind]
    model = "someone/unknown-moe" if kind == "hub" else folder
    with pytest.raises(SereError, match=message) as caught:
        quick(model, text_file, tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_incomplete_weights_are_refused(
    checkpoint: Checkpoint, text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3_moe"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.gate.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SereError, match=r"1 weights are missing.*layers\.2\.mlp\.gate\.weight"):
        quick(folder, text_file, tmp_path / "a")


def test_a_dense_model_is_refused_before_the_text_is_read(tmp_path: Path) -> None:
    from transformers import Qwen3Config

    Qwen3Config(num_hidden_layers=1, architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(SereError, match="no MoE layer found"):
        quick(tmp_path, "nowhere.txt", tmp_path / "a")


def test_data_errors_pass_through(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        quick(checkpoint("olmoe"), "nowhere.txt", tmp_path / "a")


def test_progress_lines_without_a_terminal(
    checkpoint: Checkpoint, text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    console = Console(file=io.StringIO(), width=120)
    quick(checkpoint("olmoe"), text_file, tmp_path / "a", console=console)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("calibrate: 128 of 128 tokens, ")
    assert lines[0].endswith(" tokens/s, 0 s left")
    assert capfd.readouterr() == ("", "")


def test_progress_bar_on_a_terminal(
    checkpoint: Checkpoint, text_file: Path, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    quick(checkpoint("olmoe"), text_file, tmp_path / "a", console=console)
    assert "128/128 tokens" in console.file.getvalue()
    assert "tokens/s" in console.file.getvalue()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_synthetic_fits_the_model(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = synthetic_artifact(checkpoint(name) / "config.json", seed=3)
    again = synthetic_artifact(checkpoint(name), seed=3)
    other = synthetic_artifact(checkpoint(name), seed=4)
    assert list(artifact.layers) == list(MOE_LAYERS[name])
    for index, matrix in artifact.layers.items():
        assert torch.equal(matrix, again.layers[index])
        assert not torch.equal(matrix, other.layers[index])
        assert torch.equal(matrix, matrix.T)
        assert matrix.diagonal().eq(1).all()
    metadata = artifact.metadata
    assert metadata.synthetic
    assert metadata.metric == "synthetic"
    assert metadata.router_fingerprint == {}
    assert (metadata.num_experts, metadata.top_k) == (NUM_EXPERTS, TOP_K)
    artifact.save(tmp_path / "a.safetensors")


def test_synthetic_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(SereError, match="no such folder"):
        synthetic_artifact(tmp_path / "config.json")
