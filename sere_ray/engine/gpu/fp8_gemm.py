"""The kernel of ``gate_up_fp8.py``, in Triton."""

from vllm.triton_utils import tl, tldevice

from sere_ray.engine.gpu.expert_gemm import (
    INTERPRETED,
    _into_l2,
    _jit,
    _prefetch,
    _rounded,
    _slots_of,
)

GROUP = tl.constexpr(128)
"""Columns of weights, and of a row, that share a scale."""
LARGEST = tl.constexpr(448.0)
"""Of FP8 e4m3."""
SMALLEST_SCALE = tl.constexpr(1.0 / (448.0 * 512.0))
"""Of ``silu_and_mul_per_block_quant``."""


@_jit(do_not_specialize=["count"])
def fp8_gemm(
    a: tl.tensor,  # e4m3 [*, DEPTH]
    a_scale: tl.tensor,  # float32 [*, DEPTH / 128]
    b: tl.tensor,  # e4m3 [E, 2 * COLUMNS if GATED else COLUMNS, DEPTH]
    b_scale: tl.tensor,  # float32 [E, .. / 128, DEPTH / 128]
    out: tl.tensor,  # [count, COLUMNS]: e4m3 if GATED, else bf16
    out_scale: tl.tensor,  # float32 [count, COLUMNS / 128] if GATED, else None
    scratch: tl.tensor,  # float32 [count, COLUMNS] if GATED
    arrived: tl.tensor,  # int32 [blocks, COLUMNS / 128] if GATED: zeros, and zeros again afterwards
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
    """``a @ b.T`` of every slot's row and expert; tiles as in ``expert_gemm.py``."""
    per_block: tl.constexpr = COLUMNS // BLOCK_N
    tile = tl.program_id(0)
    if OVERLAP:
        if AHEAD > 0:  # for the conditions see expert_gemm.py
            expert = tl.load(block_expert + tile // per_block, cache_modifier=".cg")
            if tile < tl.load(padded_slots, cache_modifier=".cg") // BLOCK_M * per_block:
                _prefetch(b, expert, tile % per_block, COLUMNS, DEPTH, BLOCK_N, AHEAD)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tiles = tl.load(padded_slots) // BLOCK_M * per_block
    slot = _slots_of(sorted_slots, tile // per_block, count, BLOCK_M)
    expert = tl.load(block_expert + tile // per_block)
    if tile < tiles:
        _compute_tile(
            a, a_scale, b, b_scale, out, out_scale, scratch, arrived, weights, slot, expert, count,
            tile, COLUMNS, DEPTH, TOP_K, GATED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if PERSISTENT:
        for later in range(tile + tl.num_programs(0), tiles, tl.num_programs(0)):
            slot = _slots_of(sorted_slots, later // per_block, count, BLOCK_M)
            expert = tl.load(block_expert + later // per_block)
            _compute_tile(
                a, a_scale, b, b_scale, out, out_scale, scratch, arrived, weights, slot, expert,
                count, later, COLUMNS, DEPTH, TOP_K, GATED, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@_jit()
def _compute_tile(
    a: tl.tensor,
    a_scale: tl.tensor,
    b: tl.tensor,
    b_scale: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    scratch: tl.tensor,
    arrived: tl.tensor,
    weights: tl.tensor,
    slot: tl.tensor,
    expert: tl.tensor,
    count: tl.tensor,
    tile: tl.tensor,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """``BLOCK_N`` columns of the slots of a block."""
    slot = slot.to(tl.int64)
    in_use = slot < count
    read = in_use & (expert >= 0)  # else 0, which is what stock writes
    expert = tl.maximum(expert, 0).to(tl.int64)
    column = tile % (COLUMNS // BLOCK_N)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATED:
        both = _multiply(
            a, a_scale, b, b_scale, slot // TOP_K, read, expert, column,
            COLUMNS, DEPTH, True, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        both = both.reshape(BLOCK_N // 8, 2, 8, BLOCK_M).permute(0, 2, 3, 1)
        gate, up = tl.split(both)
        result = (_silu(_rounded(gate)) * _rounded(up)).reshape(BLOCK_N, BLOCK_M)
        group = column * BLOCK_N // GROUP
        if BLOCK_N == GROUP:
            _store_fp8(result, out, out_scale, slot, in_use, group, COLUMNS)
        else:
            # Programs share a scale: the last one that arrives reads what all have left.
            at = scratch + slot[None, :] * COLUMNS + columns[:, None]
            tl.store(at, result, mask=in_use[None, :])
            tl.debug_barrier()
            place = arrived + tile // (COLUMNS // BLOCK_N) * (COLUMNS // GROUP) + group
            if tl.atomic_add(place, 1, sem="acq_rel") == GROUP // BLOCK_N - 1:
                whole = _whole_group(scratch, slot, in_use, group, COLUMNS)
                _store_fp8(whole, out, out_scale, slot, in_use, group, COLUMNS)
                tl.store(place, 0)
    else:
        weight = tl.load(weights + slot, mask=in_use, other=0.0)
        result = _multiply(
            a, a_scale, b, b_scale, slot // TOP_K, read, expert, column,
            COLUMNS, DEPTH, False, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        at = out + slot[None, :] * COLUMNS + columns[:, None]
        tl.store(at, (result * weight[None, :]).to(tl.bfloat16), mask=in_use[None, :])


@_jit()
def _multiply(
    a: tl.tensor,
    a_scale: tl.tensor,
    b: tl.tensor,
    b_scale: tl.tensor,
    row: tl.tensor,
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
    """Float32 ``[BLOCK_N, BLOCK_M]``; if GATED ``[2 * BLOCK_N, BLOCK_M]``, 8 rows of gate and of up
    in turn: a thread of the tensor core's layout holds row i and i + 8.

    Weights come first, as in stock's kernel on this GPU: wgmma wants 64 of what comes first, and a
    block has 16 slots.
    """
    groups: tl.constexpr = DEPTH // GROUP
    halves: tl.constexpr = 2 if GATED else 1
    k = tl.arange(0, GROUP)
    n = tl.arange(0, halves * BLOCK_N)
    is_up = (n // 8) % 2 if GATED else n * 0
    b_row = column * BLOCK_N + (n // 16 * 8 + n % 8 if GATED else n) + is_up * COLUMNS
    a_tile = a + row[None, :] * DEPTH + k[:, None]
    b_tile = b + expert * (halves * COLUMNS * DEPTH) + b_row[:, None] * DEPTH + k[None, :]
    b_scale += expert * (halves * COLUMNS // GROUP * groups)
    b_scale += column * BLOCK_N // GROUP * groups
    if not INTERPRETED:  # the loop would wait for each of them
        sectors = tl.minimum(tl.arange(0, 16) * 8, groups - 1)
        _into_l2(b_scale + sectors)
        if GATED:
            _into_l2(b_scale + COLUMNS // GROUP * groups + sectors)
    total = tl.zeros((halves * BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, groups, BLOCK_K // GROUP):
        for group in tl.static_range(BLOCK_K // GROUP):  # added in this order
            group += start
            part = tl.load(a_tile + group * GROUP, mask=read[None, :], other=0.0)
            scale = tl.load(a_scale + row * groups + group, mask=read, other=0.0)
            weight = tl.load(b_tile + group * GROUP)
            of_weight = tl.load(b_scale + group)
            if GATED:
                of_up = tl.load(b_scale + COLUMNS // GROUP * groups + group)
                of_weight = tl.where(is_up == 1, of_up, of_weight)[:, None]
            total += tl.dot(weight, part) * of_weight * scale[None, :]
    return total


@_jit()
def _whole_group(
    scratch: tl.tensor,
    slot: tl.tensor,
    in_use: tl.tensor,
    group: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Float32 ``[128, BLOCK_M]``, read past L1."""
    columns = group * GROUP + tl.arange(0, GROUP)
    at = scratch + slot[None, :] * COLUMNS + columns[:, None]
    return tl.load(at, mask=in_use[None, :], other=0.0, cache_modifier=".cg")


@_jit()
def _store_fp8(
    x: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    slot: tl.tensor,
    in_use: tl.tensor,
    group: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """Quantise float32 ``[128, BLOCK_M]``, a group of each slot's columns."""
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), axis=0), LARGEST), SMALLEST_SCALE)
    scaled = tl.div_rn(x, tl.broadcast_to(scale[None, :], x.shape))
    values = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST).to(tl.float8e4nv)
    columns = group * GROUP + tl.arange(0, GROUP)
    tl.store(out + slot[None, :] * COLUMNS + columns[:, None], values, mask=in_use[None, :])
    tl.store(out_scale + slot * (COLUMNS // GROUP) + group, scale, mask=in_use)


@_jit()
def _silu(gate: tl.tensor) -> tl.tensor:
    """As ``silu_and_mul_per_block_quant`` computes it; not rounded to bf16."""
    exponential = tl.exp(-gate) if INTERPRETED else tldevice.exp(-gate)
    return gate * tl.div_rn(1.0, 1.0 + exponential)
