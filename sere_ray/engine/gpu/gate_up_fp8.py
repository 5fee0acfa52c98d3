"""The two GEMMs of a layer's FP8 experts (blocks of 128 x 128) for decode batches.

Stock launches gate-and-up GEMM, SiLU with quantisation, down GEMM. Here the first two are one
launch. Results equal stock's bit for bit.
"""

from functools import cache

import torch
from torch import Tensor

from sere_ray.engine.gpu.fp8_gemm import fp8_gemm
from sere_ray.engine.gpu.gate_up import Slots, Tile, launch_options, programs_of

GROUP = 128
"""Columns and rows of a block of weights, columns of a row, that share a scale."""
MAX_ARRIVED = 1 << 16
"""Blocks of slots times groups of columns: as many as 512 rows of 16 slots with 8 groups."""
Scaled = tuple[Tensor, Tensor]
"""FP8 e4m3 values and their float32 scales."""


def gate_up_fp8(
    x: Scaled, w1: Scaled, activated: Scaled, slots: Slots, top_k: int, tile: Tile
) -> None:
    """``silu(x @ gate.T) * (x @ up.T)`` for every slot, quantised.

    Args:
        x: ``[T, H]`` and ``[T, H / 128]``.
        w1: ``[E, 2 * width, H]`` and ``[E, 2 * width / 128, H / 128]``.
        activated: ``[T * top_k, width]`` and ``[T * top_k, width / 128]``, written.
        slots: of the batch, sorted for ``tile.block_m``.
        top_k: slots of a row of ``x``.
        tile: of 32, 64 or 128 columns; with fewer than share a scale, programs of one group wait
            for none: the last one quantises.
    """
    out, out_scale = activated
    if out_scale.numel() > MAX_ARRIVED:
        raise ValueError(f"{out_scale.numel()} slots times groups: at most {MAX_ARRIVED}")
    scratch = torch.empty(out.shape, device=out.device) if tile.block_n < GROUP else None
    _launch(x, w1, out, (out_scale, scratch, arrivals(out.device)), None, slots, top_k, tile)


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
    _launch(activated, w2, out, None, weights, slots, 1, tile)


@cache
def arrivals(device: torch.device) -> Tensor:
    """Zeros that every launch leaves as zeros; made before a graph is captured, since capturing
    zeroes nothing."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first FP8 launch must not be one that a graph captures")
    return torch.zeros(MAX_ARRIVED, dtype=torch.int32, device=device)


def empty_activated(slots: int, width: int, device: torch.device) -> Scaled:
    """Room for what :func:`gate_up_fp8` writes."""
    values = torch.empty((slots, width), dtype=torch.float8_e4m3fn, device=device)
    return values, torch.empty((slots, width // GROUP), device=device)


def _launch(
    a: Scaled,
    b: Scaled,
    out: Tensor,
    gated: tuple[Tensor, Tensor | None, Tensor] | None,
    weights: Tensor | None,
    slots: Slots,
    top_k: int,
    tile: Tile,
) -> None:
    widths, depth = (32, 64, GROUP) if gated else (64, GROUP), a[0].shape[1]
    if tile.block_k not in (128, 256) or depth % tile.block_k or tile.block_n not in widths:
        raise ValueError(f"{tile}: FP8 wants block_k = 128 or 256 and block_n of {widths}")
    fp8_gemm[(programs_of(out, slots, tile),)](
        *a,
        *b,
        out,
        *(gated or (None, None, None)),
        weights,
        slots.sorted_slots,
        slots.block_expert,
        slots.padded_slots,
        out.shape[0],
        COLUMNS=out.shape[1],
        DEPTH=depth,
        TOP_K=top_k,
        GATED=gated is not None,
        **launch_options(tile),
    )
