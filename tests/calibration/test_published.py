"""Importers of the published code's two formats."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.calibration.published import import_matrices
from sere_ray.util.errors import ArtifactError, SereError
from tests.models import NUM_EXPERTS, TOP_K, build_checkpoint

LAYERS = range(4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


def matrices(size: int = NUM_EXPERTS) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {i: torch.rand(size, size, generator=generator) for i in LAYERS}


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "similarity_matrices.pt"
    torch.save(content, path)
    return path


def check(found: SimilarityArtifact, model: Path, folder: Path) -> None:
    assert list(found.layers) == list(LAYERS)
    for index, original in matrices().items():
        assert torch.equal(found.layers[index], original.fill_diagonal_(1.0))
    assert found.metadata.architecture == "Qwen3MoeForCausalLM"
    assert (found.metadata.num_experts, found.metadata.top_k) == (NUM_EXPERTS, TOP_K)
    found.save(folder / "out.safetensors")
    weights = load_file(model / "model.safetensors")
    for index in LAYERS:
        gate = weights[f"model.layers.{index}.mlp.gate.weight"]
        found.check_router(index, gate, path="x")


@pytest.mark.parametrize(
    "key",
    [
        "{}",
        "layers.{}",
        "model.layers.{}",
        "model.layers.{}.mlp",
        "model.layers.{}.mlp.similarity_matrix",
        None,
    ],
)
def test_imports_the_tensor_file(tmp_path: Path, model: Path, key: str | None) -> None:
    content = {i if key is None else key.format(i): m for i, m in matrices().items()}
    found = import_matrices(write(tmp_path, content), str(model), "cosine")
    check(found, model, tmp_path)
    assert found.metadata.metric == "cosine"


@pytest.mark.parametrize("sharded", [False, True])
def test_imports_a_calibrated_checkpoint(tmp_path: Path, model: Path, sharded: bool) -> None:
    folder = tmp_path / "calibrated"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3MoeForCausalLMSERE"], "threshold": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights |= {f"model.layers.{i}.mlp.similarity_matrix": m for i, m in matrices().items()}
    if sharded:
        (folder / "model.safetensors").unlink()
        names = sorted(weights)
        for number in range(2):
            shard = {name: weights[name] for name in names[number::2]}
            save_file(shard, folder / f"model-0000{number + 1}-of-00002.safetensors")
    else:
        save_file(weights, folder / "model.safetensors")
    found = import_matrices(folder, str(folder))
    check(found, model, tmp_path)
    assert found.metadata.metric == "unknown"


def test_bf16_matrices_and_the_diagonal(tmp_path: Path, model: Path) -> None:
    content = {i: m.bfloat16() for i, m in matrices().items()}
    content[0][2, 3] = 1.0078125  # what rounding can make of 1
    content[0][5, 5] = torch.nan
    with pytest.raises(ArtifactError, match="layer 0 holds NaN"):
        import_matrices(write(tmp_path, content), str(model), None)
    content[0][5, 5] = 0.5
    found = import_matrices(write(tmp_path, content), str(model), None).layers[0]
    assert found.dtype == torch.float32
    assert found.diagonal().eq(1).all()
    assert found.max() == 1


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, model: Path) -> None:
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (ran,)

    path = write(tmp_path, {0: Trap()})
    with pytest.raises(ArtifactError, match="refused, it is not a file of plain tensors"):
        import_matrices(path, str(model), None)
    path.write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(ArtifactError, match="refused"):
        import_matrices(path, str(model), None)
    path.write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="refused"):
        import_matrices(path, str(model), None)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.eye(3)], "holds list, must be a mapping"),
        ({}, "must be a mapping"),
        ({"mean": torch.eye(3)}, "entry 'mean' holds Tensor; allowed"),
        ({0: [1.0]}, "entry 0 holds list; allowed"),
        ({0: torch.eye(16), "0": torch.eye(16)}, "holds layer 0 twice"),
        ({0: torch.eye(16)}, r"layers \[0\], but the MoE layers of .* are \[0, 1, 2, 3\]"),
        (matrices(8), r"layer 0 is torch\.float32 \(8, 8\), must be float \(16, 16\)"),
        ({i: m * 3 for i, m in matrices().items()}, "a similarity is at most 1"),
        ({i: m.long() for i, m in matrices().items()}, "must be float"),
    ],
)
def test_other_content_is_refused(
    tmp_path: Path, model: Path, content: object, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        import_matrices(write(tmp_path, content), str(model), None)


def test_missing_file(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        import_matrices(tmp_path / "none.pt", str(model), None)


def test_a_checkpoint_that_was_not_calibrated(model: Path) -> None:
    with pytest.raises(ArtifactError, match=r"hold no model\.layers"):
        import_matrices(model, str(model), None)


def test_a_damaged_shard(tmp_path: Path, model: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ArtifactError, match="damaged safetensors file"):
        import_matrices(tmp_path, str(model), None)


def test_a_model_without_its_weights(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "config_only"
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    with pytest.raises(ArtifactError, match=r"no gate weight for MoE layers \[0, 1, 2, 3\]"):
        import_matrices(write(tmp_path, matrices()), str(folder), None)


def test_an_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(SereError, match="no such folder"):
        import_matrices(write(tmp_path, matrices()), str(tmp_path / "none"), None)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_gates_of_other_architectures(tmp_path: Path, name: str) -> None:
    folder = build_checkpoint(name, tmp_path / name)
    layers = LAYERS if name == "mixtral" else range(1, 3)
    content = {i: m for i, m in matrices().items() if i in layers}
    found = import_matrices(write(tmp_path, content), str(folder), None)
    assert list(found.metadata.router_fingerprint) == list(layers)
