"""Slots sorted by expert: what a launch writes for the expert GEMMs."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Aligned(NamedTuple):
    """Slots sorted by expert, as vLLM's Triton expert GEMM reads them."""

    sorted_slots: Tensor
    """``[capacity]`` int32: slot indices, each expert's padded with ``T * K`` to whole blocks."""
    block_expert: Tensor
    """``[capacity / block_size]`` int32: the expert of each block."""
    padded_slots: Tensor
    """``[1]`` int32: how much of ``sorted_slots`` is used."""


def empty_alignment(
    ids: Tensor, block_size: int, experts: int, most_rows: int
) -> tuple[Aligned, tuple[Any, ...]]:
    """Room for the sorted slots of ``[T, K]`` ids, and the launch's arguments for it.

    Args:
        ids: ``[T, K]``.
        block_size: rows of the expert GEMM's tile.
        experts: how many they name at most. The GEMM's grid grows with it.
        most_rows: of the kernel, :func:`sere_ray.kernel.limits.max_aligned_rows` or fewer.

    Raises:
        ValueError: more rows than a block holds, or a block size that is no power of two.
    """
    if ids.shape[0] > most_rows:
        raise ValueError(f"topk_ids {list(ids.shape)}: a launch sorts at most {most_rows} rows")
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size = {block_size}: must be a power of two")
    slots = ids.numel()
    # Each expert that is named wastes at most block_size - 1 places of its last block.
    capacity = slots + min(slots, experts) * (block_size - 1)
    blocks = -(-capacity // block_size)

    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=ids.device)

    aligned = Aligned(empty(blocks * block_size), empty(blocks), empty(1))
    return aligned, (
        np.int32(block_size.bit_length() - 1),
        aligned.sorted_slots.data_ptr(),
        np.int32(aligned.sorted_slots.numel()),
        aligned.block_expert.data_ptr(),
        aligned.padded_slots.data_ptr(),
    )
