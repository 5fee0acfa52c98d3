"""The two GEMMs of a layer's experts for decode batches, with SiLU inside the first.

Stock launches gate-and-up GEMM, SiLU-and-multiply, down GEMM. Here the first two are one launch: no
intermediate ``[T * K, 2 * width]``. Results equal stock's bit for bit: the same products are added
in the same order, and rounded in the same places.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sere_ray.engine.gpu.expert_gemm import expert_gemm

BLOCK_M = (16, 32)
"""Heights of a tile: with more, Triton takes wgmma, which adds in another order than mma.sync."""


class Slots(NamedTuple):
    """Slots sorted by expert, as vLLM prepares them; an expert's slots begin a new block."""

    sorted_slots: Tensor | None
    """``[>= padded]`` int32; ``T * K`` is padding. None: block i holds slot i only."""
    block_expert: Tensor
    """``[>= blocks]`` int32 or int64: expert of each block, -1 = nobody's: its results are 0."""
    padded_slots: Tensor
    """``[1]`` int32: how much of ``sorted_slots`` is used."""


@dataclass(frozen=True)
class Tile:
    """How one of the GEMMs is cut up.

    Attributes:
        block_m: rows, the block size that slots were sorted for.
        block_n: columns of the result.
        block_k: columns of ``a`` per step of the loop.
        num_warps: of a program.
        num_stages: tiles in flight.
        programs: per multiprocessor, each taking tile after tile; 0: a program for every tile
            that a batch could need, most of which find nothing to do.
        overlap: start while the previous kernel ends (programmatic dependent launch).
        ahead: with ``overlap``, so many columns of a tile's weights are fetched into L2 before the
            previous kernel has ended; a power of two from 128 bytes on, or 0. See :func:`down`.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 0
    overlap: bool = False
    ahead: int = 0

    def __post_init__(self) -> None:
        """Refuse tiles that would change bits."""
        if self.block_m not in BLOCK_M:
            raise ValueError(f"block_m = {self.block_m}: must be one of {BLOCK_M}")


def gate_up(x: Tensor, w1: Tensor, activated: Tensor, slots: Slots, top_k: int, tile: Tile) -> None:
    """``silu(x @ gate.T) * (x @ up.T)`` for every slot.

    Args:
        x: bf16 ``[T, H]``.
        w1: bf16 ``[E, 2 * width, H]``: an expert's gate rows, then its up rows.
        activated: bf16 ``[T * top_k, width]``, written.
        slots: of the batch, sorted for ``tile.block_m``.
        top_k: slots of a row of ``x``.
        tile: ``block_n`` counts columns of the result; twice as many rows of ``w1`` are read.
    """
    _launch(x, w1, activated, None, slots, top_k, tile, gated=True)


def down(
    activated: Tensor, w2: Tensor, weights: Tensor, out: Tensor, slots: Slots, tile: Tile
) -> None:
    """``weight * (activated @ w2.T)`` for every slot.

    Args:
        activated: bf16 ``[T * K, width]``.
        w2: bf16 ``[E, H, width]``.
        weights: float32 ``[T, K]``, contiguous.
        out: bf16 ``[T * K, H]``, written.
        slots: of the batch, sorted for ``tile.block_m``.
        tile: ``ahead`` only where the launch before is :func:`gate_up` with the same slots: it lets
            this one start only when the slots are sorted.
    """
    _launch(activated, w2, out, weights, slots, 1, tile, gated=False)


def launch_options(tile: Tile) -> dict[str, Any]:
    """What a launch of either GEMM kernel takes for its tile."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "PERSISTENT": tile.programs > 0,
        "OVERLAP": tile.overlap,
        "AHEAD": tile.ahead,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **({"launch_pdl": True} if tile.overlap else {}),
    }


def programs_of(out: Tensor, slots: Slots, tile: Tile) -> int:
    """Of a launch that writes ``out`` ``[T * K, columns]``: enough for every tile that it may need,
    or as many as the tile says."""
    count, columns = out.shape
    blocks = count
    if slots.sorted_slots is not None:
        blocks = min(count, slots.sorted_slots.numel() // tile.block_m)
    programs = blocks * -(-columns // tile.block_n)
    if tile.programs:
        programs = min(programs, tile.programs * _multiprocessors(out.device))
    return programs


def _launch(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    weights: Tensor | None,
    slots: Slots,
    top_k: int,
    tile: Tile,
    *,
    gated: bool,
) -> None:
    expert_gemm[(programs_of(out, slots, tile),)](
        a,
        b,
        out,
        weights,
        slots.sorted_slots,
        slots.block_expert,
        slots.padded_slots,
        out.shape[0],
        COLUMNS=out.shape[1],
        DEPTH=a.shape[1],
        TOP_K=top_k,
        GATED=gated,
        **launch_options(tile),
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
