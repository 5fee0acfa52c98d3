"""Weights of natively quantised checkpoints, dequantised as they are read.

===========  ==================  ==============================================================
format       stored as           means
===========  ==================  ==============================================================
FP8, blocks  ``X``,              ``X`` float8 ``[out, in]``, a float32 scale for each block of
             ``X_scale_inv``     ``weight_block_size`` (DeepSeek-V3, Qwen3 FP8)
MXFP4        ``X_blocks``,       two 4-bit numbers a byte, a power of two for each 32 of them
             ``X_scales``        (gpt-oss)
===========  ==================  ==============================================================
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from sere_ray.util.errors import SereError, UnsupportedError

_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"


def logical_names(stored: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Name of each weight -> the stored tensors that it is made of.

    Args:
        stored: names of tensors in a checkpoint.
    """
    names = set(stored)
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(names):
        whole = name.removesuffix(_BLOCKS)
        if name.endswith(_BLOCKS) and whole + _SCALES in names:
            found[whole] = (name, whole + _SCALES)
        elif name + _SCALE in names:
            found[name] = (name, name + _SCALE)
        elif not _is_scale(name, names):
            found[name] = (name,)
    return found


def _is_scale(name: str, names: set[str]) -> bool:
    if name.endswith(_SCALE):
        return name.removesuffix(_SCALE) in names
    return name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in names


def check_format(quantisation: dict[str, Any] | None, has_scales: bool, model: str) -> None:
    """Refuse a format that is not in the table above, and keys that contradict the tensors.

    Args:
        quantisation: ``quantization_config`` of the model's configuration; None = there is none.
        has_scales: the checkpoint holds a weight of several tensors.
        model: its name, for the message.

    Raises:
        UnsupportedError: names the format and those that are read.
        SereError: a format without scales, or scales without a format.
    """
    key = f"{model}: quantization_config"
    if quantisation is None:
        if has_scales:
            raise SereError(
                f"{key} is missing in config.json, but the weight files hold scales of quantised "
                "weights; copy config.json of the same checkpoint"
            )
        return
    method, block = quantisation.get("quant_method"), quantisation.get("weight_block_size")
    if method != "mxfp4" and not (method == "fp8" and block):
        raise UnsupportedError(
            f"{key}.quant_method = {method!r}"
            f"{' without weight_block_size' if method == 'fp8' else ''}: layer_streamed reads fp8 "
            "in blocks and mxfp4; give the checkpoint that it was quantised from"
        )
    if not has_scales:
        raise SereError(
            f"{key}.quant_method = {method!r}, but no weight has a scale; copy config.json of the "
            "same checkpoint"
        )


def dequantise(
    parts: list[Tensor], quantisation: dict[str, Any] | None, dtype: torch.dtype
) -> Tensor:
    """A weight from its two stored tensors.

    Args:
        parts: as :func:`logical_names` orders them.
        quantisation: as for :func:`check_format`.
        dtype: of the result.

    Returns:
        FP8: ``[out, in]``. MXFP4: ``[E, in, out]``, as transformers' gpt-oss has it.
    """
    values, scales = parts
    if values.dtype == torch.uint8:
        converted: Tensor = convert_moe_packed_tensors(values, scales, dtype=dtype)
        return converted
    assert quantisation is not None
    rows, columns = quantisation["weight_block_size"]
    spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    # The last block of a side may be cut off.
    return (values.float() * spread[: values.shape[0], : values.shape[1]]).to(dtype)
