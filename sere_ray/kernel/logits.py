"""What kernels are told of a gate, and of the mask router beside it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sere_ray.kernel.limits import LOGIT_DTYPES, reads_logits
from sere_ray.rules.gate import SCORINGS, Gate


def logit_arguments(
    logits: Tensor | None, gate: Gate, *, num_experts: int, any_gate: bool
) -> tuple[Any, ...]:
    """``LOGITS_PARAMETERS`` of ``margin.cuh``.

    Args:
        logits: ``[T, E]``, bfloat16 or float32, contiguous; None = only for the rule ``sere``.
        gate: of the layer, its bias on the device.
        num_experts: E.
        any_gate: whether the kernel was compiled for gates that are not plain.

    Raises:
        ValueError: they do not fit.
    """
    if logits is None:
        return 0, np.int32(0), 0, np.int32(0), np.int32(0)
    if not (gate.is_plain or any_gate):
        raise ValueError("a gate that is not plain needs a kernel with any_gate = True")
    _check(logits, "logits", num_experts)
    return (
        logits.data_ptr(),
        np.int32(logits.dtype.itemsize),
        0 if gate.bias is None else gate.bias.data_ptr(),
        np.int32(SCORINGS.index(gate.scoring)),
        np.int32(gate.group_size),
    )


def mask_arguments(mask_logits: Tensor | None, num_experts: int, *, takes: bool) -> tuple[Any, ...]:
    """``MASK_PARAMETERS`` of ``rule.cuh``, which kernels of one rank take last.

    Args:
        mask_logits: ``[T, E]``, contiguous; None = without masks.
        num_experts: E.
        takes: whether the kernel was compiled with masks.

    Raises:
        ValueError: they do not fit; or they are missing, or given to a kernel without masks.
    """
    if (mask_logits is not None) != takes:
        raise ValueError("a kernel with masks is given their logits, another one is not")
    if mask_logits is None:
        return ()
    _check(mask_logits, "mask_logits", num_experts)
    return mask_logits.data_ptr(), np.int32(mask_logits.dtype.itemsize)


def check_routable(
    logits: Tensor, mask_logits: Tensor | None, dtype: torch.dtype, *, can_route: bool
) -> None:
    """Refuse logits that the kernel of ``route.cu`` does not take.

    Args:
        logits: ``[T, E]``.
        mask_logits: the same; None = without masks.
        dtype: of both, as the kernel was compiled.
        can_route: whether the kernel takes the layer's shape.

    Raises:
        ValueError: says what it takes.
    """
    if mask_logits is not None and mask_logits.dtype != dtype:
        raise ValueError(f"mask_logits must be {dtype} as the gate's, got {mask_logits.dtype}")
    if logits.dtype != dtype or not logits.is_contiguous() or not can_route:
        raise ValueError(
            f"logits must be contiguous {dtype} of 32 to 256 experts, a power of "
            f"two, got {logits.dtype} {tuple(logits.shape)}, strides {logits.stride()}"
        )


def _check(logits: Tensor, name: str, num_experts: int) -> None:
    """A lane's share of a row is loaded at once."""
    row = num_experts * logits.dtype.itemsize
    is_aligned = logits.data_ptr() % min(row & -row, 16) == 0
    if not (reads_logits(logits) and logits.shape[1] == num_experts and is_aligned):
        raise ValueError(
            f"{name} must be contiguous [T, {num_experts}] of {LOGIT_DTYPES}, whole rows "
            f"from where their memory begins, got {logits.dtype} {tuple(logits.shape)}, "
            f"strides {logits.stride()}, offset {logits.storage_offset()}"
        )
