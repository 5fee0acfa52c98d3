"""The kernel of ``gate_up_fp8.py``, in Triton."""

from vllm.triton_utils import tl, tldevice

from sere_ray.engine.gpu.expert_gemm import INTERPRETED, _jit, _prefetch, _rounded, _slots_of

GROUP = tl.constexpr(128)
"""Columns of weights, and of a row, that share a scale."""
LARGEST = tl.constexpr(448.0)
"""Of FP8 e4m3."""
SMALLEST_SCALE = tl.constexpr(1.0 / (448.0 * 512.0))
"""Of ``silu_and_mul_per_block_quant``."""


@_jit(do_not_specialize=["count"])
def fp8_gemm(
    a: tl.tensor,  # e4m3 [*, DEPTH]; bf16 if a_scale is None
    a_scale: tl.tensor,  # float32 [*, DEPTH / 128], or None
    b: tl.tensor,  # e4m3 [E, 2 * COLUMNS if GATED else COLUMNS, DEPTH]
    b_scale: tl.tensor,  # float32 [E, .. / 128, DEPTH / 128]
    out: tl.tensor,  # [count, COLUMNS]: e4m3 if GATED, else bf16
    out_scale: tl.tensor,  # float32 [count, COLUMNS / 128] if GATED, else None
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
            a, a_scale, b, b_scale, out, out_scale, weights, slot, expert, count, tile % per_block,
            COLUMNS, DEPTH, TOP_K, GATED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if PERSISTENT:
        for later in range(tile + tl.num_programs(0), tiles, tl.num_programs(0)):
            slot = _slots_of(sorted_slots, later // per_block, count, BLOCK_M)
            expert = tl.load(block_expert + later // per_block)
            _compute_tile(
                a, a_scale, b, b_scale, out, out_scale, weights, slot, expert, count,
                later % per_block, COLUMNS, DEPTH, TOP_K, GATED, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@_jit()
def _compute_tile(
    a: tl.tensor,
    a_scale: tl.tensor,
    b: tl.tensor,
    b_scale: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
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
) -> None:
    """Columns ``[column * BLOCK_N, +BLOCK_N)`` of the slots of a block."""
    slot = slot.to(tl.int64)
    in_use = slot < count
    read = in_use & (expert >= 0)  # else 0, which is what stock writes
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = in_use[None, :]
    at = out + slot[None, :] * COLUMNS + columns[:, None]
    if GATED:
        gate, up = _multiply(
            a, a_scale, b, b_scale, slot // TOP_K, read, expert, column,
            COLUMNS, DEPTH, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        result = _silu(_rounded(gate)) * _rounded(up)
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(result), axis=0), LARGEST), SMALLEST_SCALE)
        tl.store(at, _to_fp8(result, scale), mask=mask)
        tl.store(out_scale + slot * (COLUMNS // GROUP) + column, scale, mask=in_use)
    else:
        weight = tl.load(weights + slot, mask=in_use, other=0.0)
        result, _ = _multiply(
            a, a_scale, b, b_scale, slot // TOP_K, read, expert, column,
            COLUMNS, DEPTH, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        tl.store(at, (result * weight[None, :]).to(tl.bfloat16), mask=mask)


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
) -> tuple[tl.tensor, tl.tensor]:
    """Two float32 ``[BLOCK_N, BLOCK_M]``: gate and up, or the result and zeros.

    Weights come first, as in stock's kernel on this GPU: wgmma wants 64 of what comes first, and a
    block has 16 slots.
    """
    groups: tl.constexpr = DEPTH // GROUP
    halves: tl.constexpr = 2 if GATED else 1
    expert = tl.maximum(expert, 0).to(tl.int64)
    k = tl.arange(0, GROUP)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    a_tile = a + row[None, :] * DEPTH + k[:, None]
    b_tile = b + expert * (halves * COLUMNS * DEPTH) + n[:, None] * DEPTH + k[None, :]
    b_scale += expert * (halves * COLUMNS // GROUP * groups)
    b_scale += column * BLOCK_N // GROUP * groups
    first = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for group in range(groups):
        part = tl.load(a_tile + group * GROUP, mask=read[None, :], other=0.0)
        if a_scale is None:
            part = part.to(tl.float32)
            scale = tl.div_rn(tl.maximum(tl.max(tl.abs(part), axis=0), 1e-10), LARGEST)
            part = _to_fp8(part, scale)
        else:
            scale = tl.load(a_scale + row * groups + group, mask=read, other=0.0)
        weight = tl.load(b_tile + group * GROUP)
        first += tl.dot(weight, part) * tl.load(b_scale + group) * scale[None, :]
        if GATED:
            weight = tl.load(b_tile + COLUMNS * DEPTH + group * GROUP)
            up_scale = tl.load(b_scale + COLUMNS // GROUP * groups + group)
            second += tl.dot(weight, part) * up_scale * scale[None, :]
    return first, second


@_jit()
def _to_fp8(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Float32 ``[N, M]`` over its ``[M]`` scales."""
    scaled = tl.div_rn(x, tl.broadcast_to(scale[None, :], x.shape))
    return tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST).to(tl.float8e4nv)


@_jit()
def _silu(gate: tl.tensor) -> tl.tensor:
    """As ``silu_and_mul_per_block_quant`` computes it; not rounded to bf16."""
    exponential = tl.exp(-gate) if INTERPRETED else tldevice.exp(-gate)
    return gate * tl.div_rn(1.0, 1.0 + exponential)
