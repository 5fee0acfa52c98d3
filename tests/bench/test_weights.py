"""Random weights of quantised models, on parameters named as vLLM's quantisation methods do."""

import math

import pytest
import torch

from sere_ray.bench.models import get_model
from sere_ray.bench.weights import SPREAD, draw_weights

FP8, E2M1 = torch.float8_e4m3fn, torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def model_of(**tensors):
    model = torch.nn.Module()
    model.mlp = torch.nn.Module()
    model.mlp.experts = torch.nn.Module()
    for name, tensor in tensors.items():
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        model.mlp.experts.register_parameter(name, parameter)
    model.mlp.gate = torch.nn.Linear(256, 64, bias=False)
    model.norm = torch.nn.LayerNorm(8, bias=False)
    return model


def values(experts, form):
    """What the weights stand for."""
    if form.startswith("fp8"):
        return experts.w13_weight.float() * float(experts.w13_weight_scale.flatten()[0])
    if form == "mxfp4":
        codes = experts.w13_weight
        codes = torch.stack([codes & 15, codes >> 4]).long()
        numbers = E2M1[codes & 7] * torch.where(codes >= 8, -1, 1)
        return numbers * torch.exp2(experts.w13_weight_scale[0, 0, 0].float() - 127)
    numbers = torch.stack([experts.w13_qweight >> bit & 15 for bit in range(0, 32, 4)])
    zero = experts.w13_qzeros[0, 0, 0] & 15
    return (numbers - zero) * experts.w13_scales[0, 0, 0].float()


def int4():
    return {
        "w13_qweight": torch.zeros(4, 32, 64, dtype=torch.int32),
        "w13_qzeros": torch.zeros(4, 2, 8, dtype=torch.int32),
        "w13_scales": torch.zeros(4, 2, 64, dtype=torch.bfloat16),
    }


FORMATS = {
    "fp8-block": lambda: {
        "w13_weight": torch.full((4, 64, 128), 1e-3).to(FP8),
        "w13_weight_scale": torch.ones(4, 1, 1),
    },
    "fp8-tensor": lambda: {
        "w13_weight": torch.full((4, 64, 128), 1e-3).to(FP8).transpose(1, 2),
        "w13_weight_scale": torch.ones(4),
    },
    "int4": int4,
    "mxfp4": lambda: {
        "w13_weight": torch.zeros(4, 64, 64, dtype=torch.uint8),
        "w13_weight_scale": torch.zeros(4, 64, 4, dtype=torch.uint8),
    },
}


@pytest.mark.parametrize("form", FORMATS)
def test_weights_of_every_format_spread_alike_and_equal_models_stay_equal(form):
    first, second = model_of(**FORMATS[form]()), model_of(**FORMATS[form]())
    assert draw_weights(first) == draw_weights(second) == 1
    stands_for = values(first.mlp.experts, form)
    assert stands_for.std() == pytest.approx(SPREAD, rel=0.2)
    assert stands_for.mean().abs() < SPREAD / 30  # else all rows are pushed alike
    assert torch.equal(stands_for, values(second.mlp.experts, form))


def test_rows_and_gates_have_trained_sizes():
    model = model_of(**int4())
    draw_weights(model)
    assert model.mlp.gate.weight.detach().std() * math.sqrt(256) == pytest.approx(1, rel=0.05)
    assert (model.norm.weight == 1).all()


def test_logits_of_a_sigmoid_gate_are_small_beside_one():
    model = model_of(**int4())
    model.mlp.gate.e_score_correction_bias = torch.nn.Parameter(torch.zeros(64))
    draw_weights(model)
    assert model.mlp.gate.weight.detach().std() * math.sqrt(256) == pytest.approx(0.25, rel=0.05)
    assert 0.01 < model.mlp.gate.e_score_correction_bias.detach().std() < 0.02


@pytest.mark.parametrize(
    ("name", "form", "back_end", "stock"),
    [
        ("qwen3-30b-a3b", "bfloat16", None, ["auto"]),
        ("qwen3-30b-a3b-fp8", "fp8-block", None, ["auto"]),
        ("qwen3-30b-a3b-fp8-tensor", "fp8-tensor", None, ["auto"]),
        ("qwen3-30b-a3b-gptq", "int4-gptq", None, ["auto"]),
        ("qwen3-30b-a3b-awq", "int4-awq", None, ["auto"]),
        ("deepseek-v3-fp8", "fp8-block", None, ["auto"]),
        ("gpt-oss-120b", "mxfp4", "marlin", ["auto", "marlin"]),
    ],
)
def test_formats_and_back_ends_of_the_models(name, form, back_end, stock):
    model = get_model(name)
    assert (model.format, model.rerouted_back_end) == (form, back_end)
    assert model.stock_back_ends == stock
