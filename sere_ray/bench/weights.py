"""Random weights for quantised models that are only shapes.

vLLM's dummy weights are within 0.001 of zero, which FP8 rounds to next to nothing, and packed ones
are left as they were: all rows then look alike, and 16 of them name 8 experts. Here they are drawn
as a checkpoint has them, before vLLM packs them for its kernels, so that every back end computes
with the same model.
"""

import math

import torch
from torch import Tensor

SPREAD = 0.02
"""Standard deviation of what quantised weights stand for."""
_FP8_SPREAD = 0.25
"""Of FP8 values: within the format's normal numbers."""
_INT4_SPREAD = 4.3
"""Of evenly spread numbers from -7 to 7. With -8, too, their mean would not be 0, and every matrix
would push all rows the same way."""
_INT4_ZEROS = int.from_bytes(b"\x88" * 4, "little", signed=True)
"""Eight zero points of 8."""
_MXFP4_EXPONENT = 127 + round(math.log2(SPREAD / 2.9))
"""Of the scale, as E8M0 has it; evenly spread e2m1 numbers have a standard deviation of 2.9."""
_STATIC_SCALE = 0.02
"""Of activations that do not come with one: they are about 1, the largest FP8 number is 448."""
EMBEDDINGS = ("embed_tokens.weight", "model.embedding.weight")
"""How models name their input embedding."""
GATE_SPREAD = {False: 1.0, True: 0.25}
"""Standard deviation of logits before they are skewed; smaller under a sigmoid."""
BIAS_SPREAD = 1 / 64
"""Of a sigmoid gate's selection bias."""


def draw_weights(model: torch.nn.Module) -> int:
    """Draw a quantised model in place; the same for equal models.

    Quantised weights stand for numbers of standard deviation ``SPREAD``. Norms are 1, embeddings
    and logits of the gates have a standard deviation of 1 (logits of sigmoid gates: 1/4).

    Args:
        model: vLLM's, before its weights are processed.

    Returns:
        How many quantised weights were drawn.
    """
    drawn = 0
    torch.manual_seed(0)
    sigmoid = any(name.endswith("e_score_correction_bias") for name, _ in model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn += _draw(name, parameter.data, sigmoid)
    return drawn


def _draw(name: str, tensor: Tensor, sigmoid: bool) -> bool:
    """Whether it is a quantised weight."""
    short = name.rpartition(".")[2]
    if tensor.dtype == torch.float8_e4m3fn:
        _draw_normal(tensor, _FP8_SPREAD)
    elif short.endswith("qweight") or (tensor.dtype == torch.uint8 and short.endswith("weight")):
        _draw_4_bits(tensor, lowest=1 if short.endswith("qweight") else 0)
    else:
        value = _value(short, tensor)
        if value is not None:
            tensor.fill_(value)
        elif name.endswith(("mlp.gate.weight", "mlp.router.weight")):
            _draw_normal(tensor, GATE_SPREAD[sigmoid] / math.sqrt(tensor.shape[1]))
        elif name.endswith(EMBEDDINGS):
            _draw_normal(tensor, 1.0)
        elif short == "e_score_correction_bias":
            _draw_normal(tensor, BIAS_SPREAD)
        return False
    return True


def _value(short: str, tensor: Tensor) -> float | None:
    """What every number of a scale, zero point or norm is."""
    if short.endswith("qzeros"):
        return _INT4_ZEROS
    if short.endswith("weight_scale") and tensor.dtype == torch.uint8:
        return _MXFP4_EXPONENT
    if short.endswith(("weight_scale", "weight_scale_inv")):
        return SPREAD / _FP8_SPREAD
    if short.endswith("input_scale"):
        return _STATIC_SCALE
    if short.endswith("scales"):
        return SPREAD / _INT4_SPREAD
    if short == "weight" and tensor.dim() == 1:
        return 1.0
    return None


def _draw_normal(tensor: Tensor, spread: float) -> None:
    for part in _parts(tensor):
        part.copy_((torch.randn(part.shape, device=part.device) * spread).to(part.dtype))


def _draw_4_bits(tensor: Tensor, lowest: int) -> None:
    """Pairs of numbers from ``lowest`` to 15."""
    count = 16 - lowest
    for part in _parts(tensor.view(torch.uint8)):
        part.random_(0, count * count)
        part.copy_((part % count + lowest) | (part // count + lowest << 4))


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Pieces that leave room for their float32 numbers."""
    return torch.split(tensor.as_strided((tensor.numel(),), (1,)), 1 << 27)
