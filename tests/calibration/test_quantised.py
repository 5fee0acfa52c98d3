"""Natively quantised checkpoints, dequantised by layer, give what their bf16 twins give."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from sere_ray.calibration import calibrate
from sere_ray.calibration.quantised import check_format, dequantise, logical_names
from sere_ray.util.errors import SereError, UnsupportedError
from tests.models import build_tokenizer

BLOCK = 32
"""Of the tiny FP8 checkpoint; published ones have 128."""


def write(folder: Path, source: Path, weights: dict, quantisation: dict | None) -> Path:
    shutil.copytree(source, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if quantisation:
        config["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def to_fp8(weight):
    """Blocks of a matrix with a scale each; sides need not be whole blocks."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight.float()
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-6) / 448
    values = (blocks / scales[:, None, :, None]).reshape(padded.shape)
    values = values[: weight.shape[0], : weight.shape[1]].contiguous()
    return values.to(torch.float8_e4m3fn), scales


def test_blocks_of_fp8_are_spread_to_their_numbers():
    """By hand: 3 x 5 numbers in blocks of 2 x 2, the last ones cut off."""
    values = torch.ones(3, 5).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = dequantise([values, scales], {"weight_block_size": [2, 2]}, torch.float32)
    assert found.tolist() == [[1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]


def test_logical_names():
    stored = ["a.weight", "a.weight_scale_inv", "b.bias", "c.up_blocks", "c.up_scales", "d_scales"]
    assert logical_names(stored) == {
        "a.weight": ("a.weight", "a.weight_scale_inv"),
        "b.bias": ("b.bias",),
        "c.up": ("c.up_blocks", "c.up_scales"),
        "d_scales": ("d_scales",),
    }


def same_calibration(quantised: Path, twin: Path, text: Path, folder: Path) -> None:
    options = {"sequences": 4, "length": 32, "batch_size": 2, "device": "cpu", "dtype": "bfloat16"}
    found, wanted = (
        calibrate(
            str(path),
            data=str(text),
            out=folder / f"{path.name}.safetensors",
            layer_streamed=True,
            **options,
        )
        for path in (quantised, twin)
    )
    assert found.layers.keys() == wanted.layers.keys()
    for layer, matrix in wanted.layers.items():
        assert torch.equal(found.layers[layer], matrix)
    assert found.metadata.router_fingerprint == wanted.metadata.router_fingerprint


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_fp8_in_blocks(architecture, checkpoint, text_file, tmp_path):
    source = checkpoint(architecture)
    quantisation = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}
    stored, twin = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        kept = (
            weight.dim() != 2 or "embed" in name or name.endswith(("gate.weight", "lm_head.weight"))
        )
        if kept:
            stored[name] = twin[name] = weight
            continue
        values, scales = to_fp8(weight)
        stored |= {name: values, f"{name}_scale_inv": scales}
        twin[name] = dequantise([values, scales], quantisation, torch.bfloat16)
    assert any(value.dtype == torch.float8_e4m3fn for value in stored.values())
    quantised = write(tmp_path / "quantised", source, stored, quantisation)
    same_calibration(quantised, write(tmp_path / "twin", source, twin, None), text_file, tmp_path)


def test_mxfp4(text_file, tmp_path):
    tokenizer = build_tokenizer()
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=16,
        vocab_size=len(tokenizer),
    )
    source = tmp_path / "source"
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    tokenizer.save_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    stored, twin = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = twin[name] = weight
            continue
        experts, inputs, outputs = weight.shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(118, 122, shape, generator=generator).to(torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        twin[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
        assert twin[name].shape == weight.shape
    quantised = write(tmp_path / "quantised", source, stored, {"quant_method": "mxfp4"})
    same_calibration(quantised, write(tmp_path / "twin", source, twin, None), text_file, tmp_path)


@pytest.mark.parametrize(
    ("quantisation", "has_scales", "kind", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, True, UnsupportedError, "'gptq': .* reads fp8 in"),
        ({"quant_method": "fp8"}, True, UnsupportedError, "without weight_block_size"),
        ({"quant_method": "mxfp4"}, False, SereError, "'mxfp4', but no weight has a scale"),
        (None, True, SereError, "missing in config.json, but the weight files hold scales"),
    ],
)
def test_what_is_refused(quantisation, has_scales, kind, message):
    with pytest.raises(kind, match=message):
        check_format(quantisation, has_scales, "Some")
