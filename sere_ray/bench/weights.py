"""Random weights for quantised models that are only shapes.

vLLM's dummy weights are within 0.001 of zero, which FP8 rounds to next to nothing: all rows then
look alike, and 16 of them name 8 experts.
"""

import torch
from torch import Tensor

_FP8_SPREAD = 0.25
"""Standard deviation of FP8 values: within the format's normal numbers."""
_SPREAD = 0.02
"""What it stands for, with its scale."""


def draw_fp8(model: torch.nn.Module) -> int:
    """Draw every FP8 weight of a model, and set its scales, in place; the same for equal models.

    Graphs read the same memory.

    Returns:
        How many weights were drawn.
    """
    drawn = 0
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            short = name.rpartition(".")[2]
            if tensor.dtype == torch.float8_e4m3fn:
                for part in torch.split(tensor.data.flatten(0, -2), 1 << 16):
                    part.copy_(_normal(part))
                drawn += 1
            elif "weight_scale" in short and tensor.is_floating_point():
                tensor.fill_(_SPREAD / _FP8_SPREAD)
    return drawn


def _normal(like: Tensor) -> Tensor:
    values = torch.randn(like.shape, device=like.device) * _FP8_SPREAD
    return values.to(like.dtype)
