"""Save, load, and every refusal of the artifact."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sere_ray.artifact.gates import router_fingerprint
from sere_ray.artifact.similarity import (
    FORMAT_VERSION,
    ArtifactMetadata,
    SimilarityArtifact,
    read_metadata,
)
from sere_ray.util.errors import ArtifactError
from sere_ray.util.files import file_sha256

SIZE = 6


def matrix(seed: int) -> Tensor:
    upper = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).triu(1)
    return (upper + upper.T).fill_diagonal_(1.0)


GATE = torch.randn(SIZE, 8, generator=torch.Generator().manual_seed(9))


def metadata() -> ArtifactMetadata:
    return ArtifactMetadata(
        model_id="org/model",
        revision="abc",
        architecture="OlmoeForCausalLM",
        num_experts=SIZE,
        top_k=2,
        router_fingerprint={1: router_fingerprint(GATE)},
        metric="frobenius",
        tokens=10,
        date="2026-01-01T00:00:00+00:00",
        synthetic=False,
    )


def artifact(**layers: Tensor) -> SimilarityArtifact:
    found = {int(k[1:]): v for k, v in layers.items()} or {1: matrix(1), 10: matrix(2)}
    return SimilarityArtifact(found, metadata())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    artifact().save(path)
    return path


def rewrite(
    path: Path,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda t: t,
    **changes: object,
) -> None:
    raw = json.loads(read_metadata(path).model_dump_json()) | changes
    content = tensors(load_file(path))
    save_file(content, path, metadata={"sere_ray": json.dumps(raw)})


def test_load_gives_back_what_was_saved(saved: Path) -> None:
    found = SimilarityArtifact.load(saved)
    assert found.metadata == metadata()
    assert sorted(found.layers) == [1, 10]
    assert torch.equal(found.matrix(10, path="x"), matrix(2))
    assert saved.stat().st_mode & 0o777 == 0o644
    assert len(file_sha256(saved)) == 64


def test_truncated(saved: Path) -> None:
    content = saved.read_bytes()
    for size in (0, 4, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:size])
        with pytest.raises(ArtifactError, match=r"not a readable safetensors file|damaged"):
            SimilarityArtifact.load(saved)


def test_a_renamed_pickle_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (ran,)

    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ArtifactError, match="pickle files are never loaded"):
        SimilarityArtifact.load(path)
    torch.save({1: matrix(1)}, path)
    with pytest.raises(ArtifactError, match=r"sere-ray artifact import"):
        SimilarityArtifact.load(path)
    assert not ran.exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file; `sere-ray calibrate` makes one"):
        SimilarityArtifact.load(tmp_path / "none")


def test_newer_format_is_refused_whatever_else_it_holds(saved: Path) -> None:
    rewrite(saved, format_version=FORMAT_VERSION + 1, unheard_of=1)
    with pytest.raises(ArtifactError, match=r"format_version = 3, .* up to 2; update sere-ray"):
        SimilarityArtifact.load(saved)


def test_without_metadata(saved: Path) -> None:
    save_file(load_file(saved), saved)
    with pytest.raises(ArtifactError, match="but not a similarity artifact"):
        SimilarityArtifact.load(saved)


@pytest.mark.parametrize("raw", ["{", "[]", "null", '{"format_version": 1}'])
def test_damaged_metadata(saved: Path, raw: str) -> None:
    save_file(load_file(saved), saved, metadata={"sere_ray": raw})
    with pytest.raises(ArtifactError, match="damaged metadata"):
        SimilarityArtifact.load(saved)


def statistics() -> dict[str, Tensor]:
    return {
        "output_norm": torch.rand(SIZE),
        "stand_in_scale": torch.rand(SIZE, SIZE),
        "stand_in_loss": torch.rand(SIZE, SIZE),
        "output_mean": torch.rand(SIZE, 5),
        "novice_score": torch.rand(SIZE),
    }


def test_statistics_come_back_and_older_files_have_none(saved: Path) -> None:
    of_layers = {1: statistics(), 10: statistics()}
    assert SimilarityArtifact.load(saved).statistics == {}
    dataclasses.replace(artifact(), statistics=of_layers).save(saved)
    found = SimilarityArtifact.load(saved)
    assert found.layers.keys() == {1, 10}
    for layer, named in of_layers.items():
        assert found.statistics[layer].keys() == named.keys()
        assert all(torch.equal(found.statistics[layer][n], t) for n, t in named.items())
    found.check_has(("output_norm", "stand_in_loss"), path="a", rule="exfold")


def test_a_rule_that_reads_more_is_refused_with_the_command(has_words: Callable[..., None]) -> None:
    partly = dataclasses.replace(artifact(), statistics={1: statistics()})
    for lacking in (artifact(), partly):
        lacking.check_has((), path="a.safetensors", rule="sere")
        with pytest.raises(ArtifactError) as caught:
            lacking.check_has(("novice_score", "output_mean"), path="a.safetensors", rule="mone")
        has_words(str(caught.value), "a.safetensors", "'mone'", "output_mean", "sere-ray calibrate")
        has_words(str(caught.value), "--statistics novices` adds")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("output_norm", torch.rand(SIZE, 1)),
        ("output_norm", torch.full((SIZE,), torch.nan)),
        ("output_norm", torch.rand(SIZE, dtype=torch.float64)),
        ("stand_in_scale", torch.rand(SIZE, SIZE + 1)),
        ("output_mean", torch.rand(SIZE)),
        ("output_mean", torch.rand(SIZE + 1, 5)),
    ],
)
def test_statistics_of_another_shape(saved: Path, name: str, tensor: Tensor) -> None:
    rewrite(saved, lambda tensors: tensors | {f"layers.1.{name}": tensor})
    with pytest.raises(ArtifactError, match=rf"layer 1: {name} .*calibrate again"):
        SimilarityArtifact.load(saved)


def test_statistics_of_a_layer_without_similarity(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors | {"layers.3.output_norm": torch.rand(SIZE)})
    with pytest.raises(ArtifactError, match="statistics of layer 3, which has no similarity"):
        SimilarityArtifact.load(saved)


@pytest.mark.parametrize("name", ["layers.1.weight", "layers.x.similarity", "layers.01.similarity"])
def test_unexpected_tensor_name(saved: Path, name: str) -> None:
    rewrite(saved, lambda tensors: tensors | {name: matrix(3)})
    with pytest.raises(ArtifactError, match=rf"unexpected tensor '{name}'; allowed: layers"):
        SimilarityArtifact.load(saved)


def bad_matrices() -> dict[str, tuple[Tensor, str]]:
    nan, infinite, diagonal = matrix(1), matrix(1), matrix(1)
    nan[2, 3] = torch.nan
    infinite[0, 1] = torch.inf
    diagonal[4, 4] = 0.0
    return {
        "nan": (nan, "layer 1 holds NaN or infinite values"),
        "infinite": (infinite, "layer 1 holds NaN or infinite values"),
        "diagonal": (diagonal, r"less similar to itself \(diagonal\)"),
        "size": (matrix(1)[:5, :5], r"\(5, 5\), must be torch\.float32 \(6, 6\)"),
        "shape": (matrix(1)[:5], r"\(5, 6\), must be"),
        "dtype": (matrix(1).bfloat16(), "is torch.bfloat16"),
    }


@pytest.mark.parametrize("kind", bad_matrices())
def test_bad_matrices_are_refused_both_ways(saved: Path, kind: str) -> None:
    bad, message = bad_matrices()[kind]
    before = saved.read_bytes()
    with pytest.raises(ArtifactError, match=message):
        artifact(l1=bad).save(saved)
    assert saved.read_bytes() == before
    rewrite(saved, lambda tensors: tensors | {"layers.1.similarity": bad.contiguous()})
    with pytest.raises(ArtifactError, match=message):
        SimilarityArtifact.load(saved)
    # As the policy actor reads it; its numpy has no bfloat16, and float32 is one name in both.
    of_numpy = message.replace("is torch.bfloat16", "other numbers than float32")
    with pytest.raises(ArtifactError, match=of_numpy):
        SimilarityArtifact.load(saved, "np")


def test_numpy_reads_the_same_numbers(saved: Path) -> None:
    of_torch, of_numpy = SimilarityArtifact.load(saved), SimilarityArtifact.load(saved, "np")
    assert of_numpy.metadata == of_torch.metadata
    assert of_numpy.layers.keys() == of_torch.layers.keys()
    for layer, numbers in of_numpy.layers.items():
        assert isinstance(numbers, np.ndarray)
        assert np.array_equal(numbers, of_torch.layers[layer].numpy())


def test_no_layers(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no layer"):
        SimilarityArtifact({}, metadata()).save(tmp_path / "a")


def test_missing_layer_is_an_error() -> None:
    with pytest.raises(ArtifactError, match=r"no matrix for MoE layer 2 \(it has layers 1, 10\)"):
        artifact().matrix(2, path="x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "MixtralForCausalLM"}, "architecture = 'OlmoeForCausalLM', but"),
        ({"num_experts": 8}, "num_experts = 6, but the model has 8"),
        ({"top_k": 3}, "top_k = 2, but the model has 3"),
    ],
)
def test_another_model(changes: dict[str, object], message: str) -> None:
    fitting = {"architecture": "OlmoeForCausalLM", "num_experts": SIZE, "top_k": 2}
    artifact().check_model(**fitting, path="x")
    with pytest.raises(ArtifactError, match=f"{message}.*'org/model'.*sere-ray calibrate"):
        artifact().check_model(**(fitting | changes), path="x")


def test_another_fine_tune() -> None:
    found = artifact()
    found.check_router(1, GATE, path="x")
    found.check_router(1, GATE.bfloat16(), path="x")  # a quantised build keeps the gate
    with pytest.raises(ArtifactError, match="router fingerprint of layer 1"):
        found.check_router(1, GATE * 1.1, path="x")
    with pytest.raises(ArtifactError, match="layer 10 is missing"):
        found.check_router(10, GATE, path="x")


def test_saving_fails_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="cannot be written"):
        artifact().save(tmp_path / "none" / "a")

    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        artifact().save(tmp_path / "a")
    assert not any(tmp_path.iterdir())
