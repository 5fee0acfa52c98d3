"""One layer at a time gives what the whole model gives, and says early what it cannot do."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.calibration import calibrate
from sere_ray.calibration.checkpoint import Checkpoint
from sere_ray.calibration.collect import collect, find_moe_layers
from sere_ray.calibration.data import make_batches
from sere_ray.calibration.loading import load_config, load_model
from sere_ray.calibration.similarity import Sums, make_sums
from sere_ray.calibration.streamed import StreamedModel
from sere_ray.util.errors import SereError, UnsupportedError
from tests.models import ARCHITECTURES, MOE_LAYERS, NUM_EXPERTS

CPU = torch.device("cpu")


def windows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = (32, 32, 20, 32, 7)  # the second and the third batch are padded
    return [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in lengths]


def streamed(path: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel(load_config(str(path)), Checkpoint(str(path)), CPU, dtype)


def two_files(source: Path, folder: Path) -> Path:
    """The checkpoint in two weight files with an index."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: weights[n] for n in part}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sums_equal_those_of_the_whole_model(
    name: str, dtype: torch.dtype, checkpoint: Callable[[str], Path]
) -> None:
    path = checkpoint(name)
    batches = make_batches(windows(), 2)
    model = load_model(str(path), revision=None, device=CPU, dtype=dtype)
    expected: dict[int, Sums] = {
        index: make_sums("frobenius", NUM_EXPERTS) for index in find_moe_layers(model)
    }
    collect(model, find_moe_layers(model), batches, expected)
    found, gates = streamed(path, dtype).collect(
        batches, lambda: make_sums("frobenius", NUM_EXPERTS)
    )
    assert list(found) == list(gates) == list(MOE_LAYERS[name])
    for index, sums in found.items():
        assert sums.tokens == expected[index].tokens == 123
        scale = expected[index].gram.abs().max().item()
        torch.testing.assert_close(sums.gram, expected[index].gram, atol=1e-6 * scale, rtol=1e-6)


def test_only_one_layer_has_memory(checkpoint: Callable[[str], Path]) -> None:
    source = streamed(checkpoint("olmoe"))
    largest = 0

    def look(tokens: int) -> None:
        nonlocal largest
        held = [p for p in source.model.parameters() if not p.is_meta]
        largest = max(largest, sum(p.numel() for p in held))

    source.collect(make_batches(windows(), 2), lambda: make_sums("frobenius", NUM_EXPERTS), look)
    model = load_model(str(checkpoint("olmoe")), revision=None, device=CPU, dtype="float32")
    assert largest == sum(p.numel() for p in model.get_decoder().layers[0].parameters())
    assert all(p.is_meta for p in source.model.parameters())


def test_a_layer_is_gone_when_the_next_one_is_filled(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = streamed(checkpoint("olmoe"))
    gone: list[weakref.ref[torch.nn.Parameter]] = []
    fill = source._fill

    def look(part: str, module: torch.nn.Module) -> None:
        assert [weight() for weight in gone] == [None] * len(gone)
        fill(part, module)
        if part != "embed_tokens.":
            gone.extend(map(weakref.ref, module.parameters()))

    monkeypatch.setattr(source, "_fill", look)
    source.collect(make_batches(windows(), 2), lambda: make_sums("frobenius", NUM_EXPERTS))
    assert gone


@pytest.mark.parametrize("metric", ["frobenius", "cka"])
def test_artifact_is_that_of_the_ordinary_mode(
    metric: str, checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    path = two_files(checkpoint("deepseek_v3"), tmp_path / "model")

    def run(name: str, layer_streamed: bool) -> SimilarityArtifact:
        return calibrate(
            str(path),
            data=str(text_file),
            out=tmp_path / name,
            metric=metric,  # type: ignore[arg-type]
            sequences=36,
            length=32,
            device="cpu",
            layer_streamed=layer_streamed,
            statistics=() if metric == "cka" else ("stand_ins", "novices"),
        )

    ordinary, one_by_one = run("a", False), run("b", True)
    assert ordinary.metadata.router_fingerprint == one_by_one.metadata.router_fingerprint
    assert ordinary.metadata.tokens == one_by_one.metadata.tokens
    for index, matrix in ordinary.layers.items():
        torch.testing.assert_close(one_by_one.layers[index], matrix, atol=1e-6, rtol=0)
        if metric == "frobenius":
            for name, tensor in ordinary.statistics[index].items():
                torch.testing.assert_close(
                    one_by_one.statistics[index][name], tensor, atol=1e-5, rtol=1e-5
                )


@pytest.mark.parametrize("layer_streamed", [False, True])
def test_a_missing_shard_is_refused_before_the_text_is_read(
    layer_streamed: bool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = two_files(checkpoint("olmoe"), tmp_path / "model")
    (path / "b.safetensors").unlink()
    with pytest.raises(SereError, match=r"1 of 2 weight files are missing.*'b\.safetensors'"):
        calibrate(str(path), data="nowhere.txt", out=tmp_path / "a", layer_streamed=layer_streamed)
    assert not (tmp_path / "a").exists()


def test_a_cut_shard_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = two_files(checkpoint("olmoe"), tmp_path / "model")
    content = (path / "b.safetensors").read_bytes()
    (path / "b.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(SereError, match=r"b\.safetensors: damaged weight file .*copy it again"):
        Checkpoint(str(path))


@pytest.mark.parametrize(
    "gone", ["layers.2.mlp.gate.weight", "layers.3.mlp.experts.7.up_proj.weight"]
)
def test_missing_weights_are_refused(
    gone: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3_moe"), path)
    weights = load_file(path / "model.safetensors")
    del weights[f"model.{gone}"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SereError, match=r"missing|do not fit"):
        streamed(path).collect(
            make_batches(windows(), 2), lambda: make_sums("frobenius", NUM_EXPERTS)
        )


def test_quantised_and_unknown_decoders_are_refused_by_name(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(checkpoint("olmoe"))
    config: PretrainedConfig = load_config(path)
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(
        UnsupportedError, match=r"OlmoeForCausalLM: .*'fp8' without weight_block_size"
    ):
        StreamedModel(config, Checkpoint(path), CPU, torch.float32)
    monkeypatch.setattr("sere_ray.calibration.streamed._PARTS", {"layers"})
    with pytest.raises(UnsupportedError, match="embed_tokens, layers, norm, rotary_emb; calibrate"):
        streamed(Path(path))
