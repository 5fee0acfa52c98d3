"""FP8 experts in blocks: the launches against vLLM's, bit for bit, and their place in vLLM."""

from types import SimpleNamespace

import pytest
import torch

from sere_ray.engine.gpu import fused_experts, patches
from sere_ray.engine.gpu.gate_up import Slots, Tile
from sere_ray.engine.gpu.gate_up_fp8 import down_fp8, empty_activated, gate_up_fp8

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
    (Tile(16, 128, 128, 8, 4, quantise=True), Tile(16, 128, 128, 4, 4)),
    (
        Tile(16, 128, 128, 8, 3, programs=1, overlap=True, quantise=True),
        Tile(16, 64, 128, 4, 4, programs=3, overlap=True, ahead=256),
    ),
    (Tile(16, 128, 128, 4, 3, overlap=True), Tile(16, 128, 128, 8, overlap=True, ahead=512)),
    (Tile(32, 128, 128, 8), Tile(32, 64, 128, 4, 4)),
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
        rows = (x, None) if first.quantise else self.quantise(x)
        gate_up_fp8(*rows, self.w1, activated, slots, TOP_K, first)
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


def test_tiles_that_would_change_bits_are_refused(stock):
    activated, slots = empty_activated(8, WIDTH, DEVICE), Slots(None, None, None)
    for tile in (Tile(16, 64, 128), Tile(16, 128, 64)):
        with pytest.raises(ValueError, match="block_k = 128 and block_n = 128"):
            gate_up_fp8(torch.zeros(1, HIDDEN), None, stock.w1, activated, slots, TOP_K, tile)


# --- in vLLM's place ----------------------------------------------------------------------------


def experts_of(quant_dtype=FP8, block=BLOCK):
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    experts = object.__new__(TritonExperts)
    scales = {"w1_scale": torch.ones(8, 2, 2), "w2_scale": torch.ones(8, 2, 1), "a1_scale": None}
    experts.quant_config = SimpleNamespace(
        quant_dtype=quant_dtype, block_shape=block, per_act_token_quant=False, w1_bias=None,
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
        "hidden_states": torch.randn(rows, 256).bfloat16(),
        "w1": torch.ones(8, 256, 256).to(FP8),
        "w2": torch.ones(8, 256, 128).to(FP8),
        "topk_weights": torch.rand(rows, top_k),
        "topk_ids": torch.randint(0, 8, (rows, top_k)),
        "activation": MoEActivation.SILU,
        "global_num_experts": 8,
        "expert_map": None,
        "a1q_scale": None,
        "a2_scale": None,
        "workspace13": torch.empty(rows, top_k, 256).bfloat16(),
        "workspace2": torch.empty(rows, top_k, 256).bfloat16(),
        "expert_tokens_meta": None,
        "apply_router_weight_on_input": False,
    }


@pytest.fixture
def launches(monkeypatch):
    """Which rows the launches are given; tiles whose first GEMM quantises or not."""
    from vllm.model_executor.layers.fused_moe import utils
    from vllm.model_executor.layers.fused_moe.experts import triton_moe
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    from sere_ray.engine.gpu import gate_up_fp8 as kernels

    seen = []
    monkeypatch.setattr(fp8_utils, "is_deep_gemm_e8m0_used", lambda: False)
    monkeypatch.setattr(
        utils, "moe_kernel_quantize_input", lambda rows, *_: (rows.to(FP8), torch.ones(1))
    )
    monkeypatch.setattr(
        triton_moe, "_prepare_expert_assignment", lambda *_, **__: (None, None, None)
    )
    monkeypatch.setattr(
        kernels, "gate_up_fp8", lambda x, scale, *_: seen.append((x.dtype, scale is None))
    )
    monkeypatch.setattr(kernels, "down_fp8", lambda *args: args[3].fill_(1))
    return seen


@pytest.mark.parametrize("quantise", [True, False])
def test_rows_are_quantised_once(launches, monkeypatch, quantise):
    tiles = fused_experts.Tiles(Tile(16, 128, 128, quantise=quantise), Tile(16, 64, 128))
    monkeypatch.setattr(fused_experts, "tiles_for", lambda *_, fp8: tiles if fp8 else None)
    call = call_of()
    fused_experts.apply_experts(None, experts_of(), **call)
    assert launches == [(torch.bfloat16, True) if quantise else (FP8, False)]
    assert (call["output"] == 2).all()


def test_what_is_not_covered_reaches_vllm_as_stock_passes_it(launches, monkeypatch):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    tiles = fused_experts.Tiles(Tile(16, 128, 128), Tile(16, 64, 128))
    found = []

    def original(experts, **call):
        found.append((call["hidden_states"].dtype, call["a1q_scale"] is None))

    for tiles_of_shape, changes in (
        (None, {}),
        (tiles, {"activation": MoEActivation.GELU}),
        (tiles, {"apply_router_weight_on_input": True}),
    ):
        monkeypatch.setattr(fused_experts, "tiles_for", lambda *_, fp8, t=tiles_of_shape: t)
        fused_experts.apply_experts(original, experts_of(), **{**call_of(), **changes})
    assert found == [(FP8, False)] * 3
    assert not launches


def test_only_experts_with_blocks_are_given_bf16_rows():
    assert fused_experts.takes_bf16_rows(experts_of())
    assert not fused_experts.takes_bf16_rows(experts_of(block=None))
    assert not fused_experts.takes_bf16_rows(experts_of(quant_dtype=None))


def test_rows_stay_bf16_only_where_a_layer_said_so():
    def prepare(kernel, *args, defer_input_quant):
        return defer_input_quant

    kernel = SimpleNamespace()
    assert not patches._keep_rows(prepare, kernel, "rows", defer_input_quant=False)
    kernel.sere_keeps_rows = True
    assert patches._keep_rows(prepare, kernel, "rows", defer_input_quant=False)


def test_a_pass_that_is_not_deferred_is_quantised_as_stock_does(launches):
    experts, found = experts_of(), []
    experts.sere_state = SimpleNamespace(deferred=None)

    def original(experts, **call):
        found.append(call["hidden_states"].dtype)

    patches._compute_experts(original, experts, **call_of())
    assert found == [FP8]
