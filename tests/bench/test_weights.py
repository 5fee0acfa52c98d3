import pytest
import torch

from sere_ray.bench.models import get_model
from sere_ray.bench.weights import draw_fp8


class Quantised(torch.nn.Module):
    """A block-quantised matrix as vLLM's dummy weights leave it, and a gate that is not."""

    def __init__(self):
        super().__init__()
        shapes = {"weight": (256, 128), "w13_weight": (4, 64, 128)}
        for name, shape in shapes.items():
            small = torch.full(shape, 1e-3).to(torch.float8_e4m3fn)
            self.register_parameter(name, torch.nn.Parameter(small, requires_grad=False))
        for name in ("weight_scale_inv", "gate"):
            ones = torch.nn.Parameter(torch.ones(2, 1), requires_grad=False)
            self.register_parameter(name, ones)


def test_every_fp8_weight_is_drawn_and_equal_models_stay_equal():
    first, second = Quantised(), Quantised()
    assert draw_fp8(first) == draw_fp8(second) == 2
    for name in ("weight", "w13_weight"):
        values = getattr(first, name).float()
        assert 0.2 < values.std() < 0.3
        assert torch.isfinite(values).all()
        assert torch.equal(values, getattr(second, name).float())
    assert first.weight_scale_inv.unique().item() < 1
    assert (first.gate == 1).all()


@pytest.mark.parametrize(
    ("name", "format", "back_end"),
    [
        ("qwen3-30b-a3b", "bfloat16", None),
        ("qwen3-30b-a3b-fp8", "fp8", None),
        ("gpt-oss-120b", "mxfp4", "marlin"),
    ],
)
def test_formats_and_back_ends_of_the_models(name, format, back_end):
    model = get_model(name)
    assert (model.format, model.rerouted_back_end) == (format, back_end)
    assert model.num_experts == 128
