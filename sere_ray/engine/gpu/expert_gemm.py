"""The kernel of ``gate_up.py``, in Triton."""

import os
from collections.abc import Callable
from typing import Any

from vllm.triton_utils import tl, tldevice, triton

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""True in tests under Triton's interpreter, which has neither libdevice nor PTX."""


def _jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    decorate: Callable[[Callable[..., Any]], Any] = triton.jit(**options)
    return decorate


@_jit(do_not_specialize=["count"])
def expert_gemm(
    a: tl.tensor,  # bf16 [*, DEPTH]
    b: tl.tensor,  # bf16 [E, 2 * COLUMNS if GATED else COLUMNS, DEPTH]
    out: tl.tensor,  # bf16 [count, COLUMNS]
    weights: tl.tensor,  # float32 [count]; None if GATED
    sorted_slots: tl.tensor,
    block_expert: tl.tensor,
    padded_slots: tl.tensor,
    count: tl.tensor,  # T * K
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PERSISTENT: tl.constexpr,
    OVERLAP: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """``a @ b.T`` of every slot's row and expert; see ``gate_up.py``, which launches it.

    Tiles are taken in the order of blocks, so that the ones in use come first.
    """
    per_block: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    if OVERLAP:
        if AHEAD > 0:
            # The slots were sorted before the previous kernel let this one start, so weights can
            # be fetched while it ends. Read past L1, which may hold an earlier step's slots.
            expert = tl.load(block_expert + tile // per_block, cache_modifier=".cg")
            if tile < tl.load(padded_slots, cache_modifier=".cg") // BLOCK_M * per_block:
                _prefetch(b, expert, tile % per_block, COLUMNS, DEPTH, BLOCK_N, AHEAD)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Three loads at once: a program that waited for the first to know whether it has a tile at all
    # would ask for its weights later. There is a block for every program, if perhaps an unused one.
    tiles = tl.load(padded_slots) // BLOCK_M * per_block
    slot = _slots_of(sorted_slots, tile // per_block, count, BLOCK_M)
    expert = tl.load(block_expert + tile // per_block)
    if tile < tiles:
        _compute_tile(
            a, b, out, weights, slot, expert, count, tile % per_block,
            COLUMNS, DEPTH, TOP_K, GATED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if PERSISTENT:
        for later in range(tile + tl.num_programs(0), tiles, tl.num_programs(0)):
            slot = _slots_of(sorted_slots, later // per_block, count, BLOCK_M)
            expert = tl.load(block_expert + later // per_block)
            _compute_tile(
                a, b, out, weights, slot, expert, count, later % per_block,
                COLUMNS, DEPTH, TOP_K, GATED, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@_jit()
def _slots_of(
    sorted_slots: tl.tensor, block: tl.tensor, count: tl.tensor, BLOCK_M: tl.constexpr
) -> tl.tensor:
    """Int32 ``[BLOCK_M]``; ``count`` and above is padding."""
    rows = tl.arange(0, BLOCK_M)
    if sorted_slots is None:
        return tl.where(rows == 0, block, count)
    else:
        return tl.load(sorted_slots + block * BLOCK_M + rows)


@_jit()
def _compute_tile(
    a: tl.tensor,
    b: tl.tensor,
    out: tl.tensor,
    weights: tl.tensor,
    slot: tl.tensor,
    expert: tl.tensor,
    count: tl.tensor,
    column: tl.tensor,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Columns ``[column * BLOCK_N, +BLOCK_N)`` of the slots of a block."""
    slot = slot.to(tl.int64)
    in_use = slot < count
    read = in_use & (expert >= 0)  # else 0 = silu(0) * 0, which is what stock writes
    if not GATED:
        weight = tl.load(weights + slot, mask=in_use, other=0.0)  # not in the tail, as stock does
    accumulator = _multiply(
        a + (slot // TOP_K)[:, None] * DEPTH, b, read, tl.maximum(expert, 0).to(tl.int64), column,
        COLUMNS, DEPTH, GATED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if GATED:
        gate, up = tl.split(accumulator.reshape(BLOCK_M, BLOCK_N, 2))
        result = _silu(_rounded(gate)) * _rounded(up)
    else:
        result = accumulator * weight[:, None]
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = in_use[:, None] & (columns[None, :] < COLUMNS)
    tl.store(out + slot[:, None] * COLUMNS + columns[None, :], result.to(tl.bfloat16), mask=mask)


@_jit()
def _multiply(
    a_rows: tl.tensor,
    b: tl.tensor,
    read: tl.tensor,
    expert: tl.tensor,
    column: tl.tensor,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Float32 ``[BLOCK_M, BLOCK_N]``; if GATED ``[BLOCK_M, 2 * BLOCK_N]``, gate and up in turn."""
    # Gate and up rows in turn: a thread of the tensor core's layout holds pairs of neighbouring
    # columns of the result, so that SiLU needs no exchange between threads.
    halves: tl.constexpr = 2 if GATED else 1
    n = tl.arange(0, halves * BLOCK_N)
    b_row = (column * BLOCK_N + n // halves) % COLUMNS + n % halves * COLUMNS
    k = tl.arange(0, BLOCK_K)
    a_tile = a_rows + k[None, :]
    b_tile = b + expert * (halves * COLUMNS * DEPTH) + b_row[None, :] * DEPTH + k[:, None]
    accumulator = tl.zeros((BLOCK_M, halves * BLOCK_N), dtype=tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            a_part = tl.load(a_tile + start, mask=read[:, None], other=0.0)
            b_part = tl.load(b_tile + start)
        else:
            a_mask = read[:, None] & (k[None, :] < DEPTH - start)
            b_mask = k[:, None] < DEPTH - start
            a_part = tl.load(a_tile + start, mask=a_mask, other=0.0)
            b_part = tl.load(b_tile + start, mask=b_mask, other=0.0)
        accumulator = tl.dot(a_part, b_part, accumulator)
    return accumulator


@_jit()
def _rounded(x: tl.tensor) -> tl.tensor:
    """Float32 as stock finds it in the intermediate, which is bf16."""
    return x.to(tl.bfloat16).to(tl.float32)


@_jit()
def _silu(gate: tl.tensor) -> tl.tensor:
    """As vLLM's C++ computes it: CUDA's ``expf`` and an exactly rounded division."""
    exponential = tl.exp(-gate) if INTERPRETED else tldevice.exp(-gate)
    return _rounded(tl.div_rn(gate, 1.0 + exponential))


@_jit()
def _prefetch(
    b: tl.tensor,
    expert: tl.tensor,
    column: tl.tensor,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """Bring a tile's first weights (``b`` ``[E, COLUMNS, DEPTH]``) into L2, line by line."""
    per_line: tl.constexpr = 1024 // b.dtype.element_ty.primitive_bitwidth  # 128 bytes
    row = (column * BLOCK_N + tl.arange(0, BLOCK_N)) % COLUMNS
    line = tl.arange(0, AHEAD // per_line) * per_line
    tile = b + tl.maximum(expert, 0).to(tl.int64) * (COLUMNS * DEPTH)
    _into_l2(tile + row[:, None] * DEPTH + tl.minimum(line, DEPTH - 1)[None, :])


@_jit()
def _into_l2(address: tl.tensor) -> None:
    """Fetch the lines of these pointers, and wait for none."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [address.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
