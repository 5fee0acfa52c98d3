"""The two GEMMs of a layer's FP8 experts (blocks of 128 x 128) for decode batches.

Stock launches: quantise rows, gate-and-up GEMM, SiLU and quantise, down GEMM. Here the first three
are one launch, or two where ``x`` comes quantised. Results equal stock's bit for bit.
"""

from typing import Any

import torch
from torch import Tensor

from sere_ray.engine.gpu.fp8_gemm import fp8_gemm
from sere_ray.engine.gpu.gate_up import Slots, Tile, programs_of

GROUP = 128
"""Columns and rows of a block of weights, columns of a row, that share a scale."""
Scaled = tuple[Tensor, Tensor]
"""FP8 e4m3 values and their float32 scales."""


def gate_up_fp8(
    x: Tensor,
    x_scale: Tensor | None,
    w1: Scaled,
    activated: Scaled,
    slots: Slots,
    top_k: int,
    tile: Tile,
) -> None:
    """``silu(x @ gate.T) * (x @ up.T)`` for every slot, quantised.

    Args:
        x: ``[T, H]`` e4m3, or bf16 that is quantised on the way.
        x_scale: ``[T, H / 128]``, or None.
        w1: ``[E, 2 * width, H]`` and ``[E, 2 * width / 128, H / 128]``.
        activated: ``[T * top_k, width]`` and ``[T * top_k, width / 128]``, written.
        slots: of the batch, sorted for ``tile.block_m``.
        top_k: slots of a row of ``x``.
        tile: of 128 columns, which share a scale.
    """
    _launch(x, x_scale, w1, *activated, None, slots, top_k, tile)


def down_fp8(
    activated: Scaled, w2: Scaled, weights: Tensor, out: Tensor, slots: Slots, tile: Tile
) -> None:
    """``weight * (activated @ w2.T)`` for every slot.

    Args:
        activated: ``[T * K, width]`` and ``[T * K, width / 128]``.
        w2: ``[E, H, width]`` and ``[E, H / 128, width / 128]``.
        weights: float32 ``[T, K]``, contiguous.
        out: bf16 ``[T * K, H]``, written.
        slots: of the batch, sorted for ``tile.block_m``.
        tile: of 64 or 128 columns; ``ahead`` as in :func:`sere_ray.engine.gpu.gate_up.down`.
    """
    _launch(*activated, w2, out, None, weights, slots, 1, tile)


def _launch(
    a: Tensor,
    a_scale: Tensor | None,
    b: Scaled,
    out: Tensor,
    out_scale: Tensor | None,
    weights: Tensor | None,
    slots: Slots,
    top_k: int,
    tile: Tile,
) -> None:
    gated = out_scale is not None
    if tile.block_k != GROUP or tile.block_n not in ((GROUP,) if gated else (64, GROUP)):
        raise ValueError(f"{tile}: FP8 wants block_k = 128 and block_n = 128 (64 for the second)")
    options: dict[str, Any] = {"launch_pdl": True} if tile.overlap else {}
    fp8_gemm[(programs_of(out, slots, tile),)](
        a,
        a_scale,
        *b,
        out,
        out_scale,
        weights,
        slots.sorted_slots,
        slots.block_expert,
        slots.padded_slots,
        out.shape[0],
        COLUMNS=out.shape[1],
        DEPTH=a.shape[1],
        TOP_K=top_k,
        GATED=gated,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        PERSISTENT=tile.programs > 0,
        OVERLAP=tile.overlap,
        AHEAD=tile.ahead,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **options,
    )


def empty_activated(slots: int, width: int, device: torch.device) -> Scaled:
    """Room for what :func:`gate_up_fp8` writes."""
    values = torch.empty((slots, width), dtype=torch.float8_e4m3fn, device=device)
    return values, torch.empty((slots, width // GROUP), device=device)
