"""FP8 experts in blocks: the launches against vLLM's, bit for bit, and their place in vLLM."""

from types import SimpleNamespace

import pytest
import torch

from sere_ray.engine.gpu import fused_experts
from sere_ray.engine.gpu.gate_up import Slots, Tile
from sere_ray.engine.gpu.gate_up_fp8 import arrivals, down_fp8, empty_activated, gate_up_fp8
from tests.engine.test_drift import function_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8, BLOCK = torch.float8_e4m3fn, [128, 128]
EXPERTS, TOP_K, HIDDEN, WIDTH = 32, 8, 2048, 768
STOCK_TILE = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 128,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}
TILES = [
    (Tile(16, 128, 128), Tile(16, 64, 128)),
    (Tile(16, 64, 128, 4, 4), Tile(16, 128, 128, 4, 4)),
    (
        Tile(16, 32, 128, 4, 4, programs=4, overlap=True),
        Tile(16, 64, 128, 4, 4, programs=3, overlap=True, ahead=256),
    ),
    (Tile(16, 32, 128, 4, 5, overlap=True), Tile(16, 128, 128, 8, overlap=True, ahead=512)),
    (Tile(16, 32, 256, 4, 3, overlap=True), Tile(16, 64, 256, overlap=True, ahead=256)),
    (Tile(16, 64, 256, 8, 3, programs=2), Tile(16, 128, 256, programs=2)),
    (Tile(32, 64, 128, 8), Tile(32, 64, 128, 4, 4)),
]


class Stock:
    """Random experts, and what vLLM computes with them."""

    def __init__(self):
        torch.manual_seed(0)

        def scaled(rows, columns):
            values = (torch.randn(EXPERTS, rows, columns, device=DEVICE) / 4).to(FP8)
            return values, torch.rand(EXPERTS, rows // 128, columns // 128, device=DEVICE) / 5

        self.w1, self.w2 = scaled(2 * WIDTH, HIDDEN), scaled(HIDDEN, WIDTH)

    def batch(self, rows, named, spread=1.0):
        x = torch.randn(rows, HIDDEN, device=DEVICE).bfloat16() * spread
        ids = torch.randint(0, named, (rows, TOP_K), dtype=torch.int32, device=DEVICE)
        return x, torch.rand(rows, TOP_K, device=DEVICE), ids

    def sort(self, ids, block_m):
        from vllm.model_executor.layers.fused_moe.fused_moe import _prepare_expert_assignment

        block = {"BLOCK_SIZE_M": block_m}
        return Slots(*_prepare_expert_assignment(ids, block, len(ids), TOP_K, EXPERTS, None))

    def quantise(self, x):
        from vllm.model_executor.layers.quantization.utils.fp8_utils import (
            per_token_group_quant_fp8,
        )

        return per_token_group_quant_fp8(x, 128, use_ue8m0=False)

    def run(self, x, weights, slots, block_m):
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.fused_moe.fused_moe import invoke_fused_moe_triton_kernel
        from vllm.triton_utils import tl

        both = x.new_empty(len(x), TOP_K, 2 * WIDTH)
        out = x.new_empty(len(x), TOP_K, HIDDEN)
        names = ("int8_w8a8", "int8_w8a16", "int4_w4a16")
        common = {
            "config": {**STOCK_TILE, "BLOCK_SIZE_M": block_m},
            "compute_type": tl.bfloat16,
            "use_fp8_w8a8": True,
            "per_channel_quant": False,
            "block_shape": BLOCK,
            **{f"use_{name}": False for name in names},
        }
        values, scale = self.quantise(x)
        invoke_fused_moe_triton_kernel(
            values, self.w1[0], both, scale, self.w1[1], None, *slots, False, TOP_K, **common
        )
        activated = ops.silu_and_mul_per_block_quant(both.view(-1, 2 * WIDTH), 128, FP8)
        invoke_fused_moe_triton_kernel(
            activated[0], self.w2[0], out, activated[1], self.w2[1], weights, *slots, True, 1,
            **common,
        )  # fmt: skip
        return *activated, out.view(-1, HIDDEN)

    def ours(self, x, weights, slots, first, second):
        activated = empty_activated(weights.numel(), WIDTH, x.device)
        out = x.new_full((weights.numel(), HIDDEN), 9)
        gate_up_fp8(self.quantise(x), self.w1, activated, slots, TOP_K, first)
        down_fp8(activated, self.w2, weights, out, slots, second)
        return *activated, out


@pytest.fixture(scope="module")
def stock():
    return Stock()


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(
    ("rows", "named", "spread"),
    [(1, 16, 1), (4, 3, 1), (16, 10, 1), (16, 32, 1e-4), (33, 16, 30), (128, 9, 1)],
)
def test_bits_of_vllm(stock, rows, named, spread, tiles):
    x, weights, ids = stock.batch(rows, named, spread)
    slots = stock.sort(ids, tiles[0].block_m)
    wanted = stock.run(x, weights, slots, tiles[0].block_m)
    for name, mine, theirs in zip(
        ("values", "scales", "out"), stock.ours(x, weights, slots, *tiles), wanted, strict=True
    ):
        assert torch.equal(mine.float(), theirs.float()), name


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", TILES[1:4])
def test_a_graph_follows_its_slots(stock, tiles):
    """One capture; batches that need few blocks, then many."""
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    x, weights, ids = stock.batch(32, 1)
    results = []

    def step():
        slots = Slots(*moe_align_block_size(ids, 16, EXPERTS, None))
        results[:] = [slots, *stock.ours(x, weights, slots, *tiles)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for named in (1, 16, 2, 16, 5):
        ids.copy_(stock.batch(32, named)[2])
        graph.replay()
        for wanted, found in zip(stock.run(x, weights, results[0], 16), results[1:], strict=True):
            assert torch.equal(found.float(), wanted.float())


@pytest.mark.gpu
def test_programs_that_share_a_scale_leave_zeros(stock):
    x, weights, ids = stock.batch(128, 32)
    for _ in range(20):  # the last one to arrive is another one each time
        stock.ours(x, weights, stock.sort(ids, 16), *TILES[2])
    assert not arrivals(x.device).any()


def test_tiles_that_would_change_bits_are_refused(stock):
    activated, slots = empty_activated(8, WIDTH, torch.device(DEVICE)), Slots(None, None, None)
    for tile in (Tile(16, 16, 128), Tile(16, 128, 64), Tile(16, 64, 512)):
        with pytest.raises(ValueError, match="FP8 wants block_k = 128 or 256 and"):
            gate_up_fp8(stock.w1, stock.w1, activated, slots, TOP_K, tile)


# --- in vLLM's place ----------------------------------------------------------------------------


def experts_of(quant_dtype=FP8, block=BLOCK):
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    experts = object.__new__(TritonExperts)
    scales = {"w1_scale": torch.ones(8, 2, 2), "w2_scale": torch.ones(8, 2, 1)}
    experts.quant_config = SimpleNamespace(
        quant_dtype=quant_dtype, block_shape=block, w1_bias=None,
        w2_bias=None, weight_quant_dtype=FP8, **scales,
    )  # fmt: skip
    experts.activation_config = SimpleNamespace(clamp_limit=None)
    experts.quantization_emulation = False
    experts.moe_sum = lambda gathered, output, ids, expert_map: output.copy_(gathered.sum(1))
    return experts


def call_of(rows=3, top_k=2):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return {
        "output": torch.zeros(rows, 256).bfloat16(),
        "hidden_states": torch.ones(rows, 256).to(FP8),
        "w1": torch.ones(8, 256, 256).to(FP8),
        "w2": torch.ones(8, 256, 128).to(FP8),
        "topk_weights": torch.rand(rows, top_k),
        "topk_ids": torch.randint(0, 8, (rows, top_k)),
        "activation": MoEActivation.SILU,
        "global_num_experts": 8,
        "expert_map": None,
        "a1q_scale": torch.ones(rows, 2),
        "a2_scale": None,
        "workspace13": torch.empty(rows, top_k, 256).bfloat16(),
        "workspace2": torch.empty(rows, top_k, 256).bfloat16(),
        "expert_tokens_meta": None,
        "apply_router_weight_on_input": False,
    }


@pytest.fixture
def launches(monkeypatch):
    """What the launches are given; tiles for every batch."""
    from vllm.model_executor.layers.fused_moe.experts import triton_moe
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    from sere_ray.engine.gpu import gate_up_fp8 as kernels

    seen = []
    tiles = fused_experts.Tiles(Tile(16, 128, 128), Tile(16, 64, 128))
    monkeypatch.setattr(fused_experts, "tiles_for", lambda *_, fp8: tiles if fp8 else None)
    monkeypatch.setattr(fp8_utils, "is_deep_gemm_e8m0_used", lambda: False)
    monkeypatch.setattr(
        triton_moe, "_prepare_expert_assignment", lambda *_, **__: (None, None, None)
    )
    monkeypatch.setattr(kernels, "gate_up_fp8", lambda x, w1, *_: seen.append((*x, *w1)))
    monkeypatch.setattr(kernels, "down_fp8", lambda *args: args[3].fill_(1))
    return seen


def test_a_batch_in_blocks_is_computed_here(launches):
    call, experts = call_of(), experts_of()
    fused_experts.apply_experts(None, experts, **call)
    (given,) = launches
    wanted = call["hidden_states"], call["a1q_scale"], call["w1"], experts.w1_scale
    assert all(found is tensor for found, tensor in zip(given, wanted, strict=True))
    assert (call["output"] == 2).all()


def test_what_is_not_covered_is_left_to_vllm(launches, monkeypatch):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    found = []

    def check(experts, **changes):
        call = {**call_of(), **changes}
        fused_experts.apply_experts(lambda _, **left: found.append(left == call), experts, **call)

    check(experts_of(), activation=MoEActivation.GELU)
    check(experts_of(), apply_router_weight_on_input=True)
    check(experts_of(), a1q_scale=torch.ones(3, 2).double())
    check(experts_of(), w1=torch.ones(8, 256, 256))
    check(experts_of(block=None))
    check(experts_of(quant_dtype=None))
    monkeypatch.setattr(fp8_utils, "is_deep_gemm_e8m0_used", lambda: True)
    check(experts_of())
    assert found == [True] * 7
    assert not launches


# --- what the launches count on in vLLM: read, not imported ---------------------------------------


def test_stock_quantises_adds_and_swaps_as_ours():
    _, kernel = function_of("model_executor.layers.fused_moe.fused_moe", "fused_moe_kernel")
    assert "tl.dot(b, a) * b_scale[:, None] * a_scale[None, :]" in kernel
    _, launch = function_of(
        "model_executor.layers.fused_moe.fused_moe", "invoke_fused_moe_triton_kernel"
    )
    assert "BLOCK_SIZE_K = min(BLOCK_SIZE_K, min(block_shape[0], block_shape[1]))" in launch
    _, swaps = function_of("model_executor.layers.fused_moe.utils", "enable_swap_ab")
    assert "is_device_capability(90) and BLOCK_SIZE_M < 64 and (BLOCK_SIZE_N >= 64)" in swaps
    _, apply = function_of("model_executor.layers.fused_moe.experts.triton_moe", "apply")
    steps = [
        "self.block_shape == [128, 128]",
        "not is_deep_gemm_e8m0_used()",
        "silu_and_mul_per_block_quant(intermediate_cache1.view(-1, N), group_size=128",
        "qintermediate_cache2, w2, intermediate_cache3, a2q_scale, self.w2_scale",
    ]
    places = [apply.index(step) for step in steps]
    assert places == sorted(places)
