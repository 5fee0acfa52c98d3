"""What kernels with the rules ``margin`` and ``spare`` are told of a gate."""

from typing import Any

import numpy as np
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
    # A lane's share of a row is loaded at once.
    row = num_experts * logits.dtype.itemsize
    is_aligned = logits.data_ptr() % min(row & -row, 16) == 0
    if not (reads_logits(logits) and logits.shape[1] == num_experts and is_aligned):
        raise ValueError(
            f"logits must be contiguous [T, {num_experts}] of {LOGIT_DTYPES}, whole rows "
            f"from where their memory begins, got {logits.dtype} {tuple(logits.shape)}, "
            f"strides {logits.stride()}, offset {logits.storage_offset()}"
        )
    return (
        logits.data_ptr(),
        np.int32(logits.dtype.itemsize),
        0 if gate.bias is None else gate.bias.data_ptr(),
        np.int32(SCORINGS.index(gate.scoring)),
        np.int32(gate.group_size),
    )
