"""Expert GEMMs with SiLU inside: a torch reference, then vLLM's own launches, bit for bit.

The kernel tests need a GPU. Values are small multiples of 1/8 where torch is the reference, so that
sums are exact in any order.
"""

import ast
from types import SimpleNamespace

import pytest
import torch

from sere_ray.engine.gpu import fused_experts
from sere_ray.engine.gpu.gate_up import Slots, Tile, down, gate_up
from tests.engine.test_drift import function_of, tree_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULE = "model_executor.layers.fused_moe.experts.triton_moe"
SHAPES = [  # rows, top-k, hidden, width; 8 experts
    (1, 2, 64, 32),
    (3, 3, 96, 48),
    (5, 2, 160, 96),
    (20, 4, 128, 40),
    (20, 1, 64, 96),
]
GRIDS = [Tile(16, 16, 64), Tile(16, 32, 32, programs=2), Tile(32, 64, 128, num_warps=8)]


def eighths(*shape):
    return (torch.randint(-8, 9, shape, device=DEVICE) / 8).bfloat16()


def reference_gate_up(x, w1, ids):
    """bf16 ``[T * K, width]`` with every rounding of stock; 0 for ids of -1."""
    width, slots = w1.shape[1] // 2, ids.numel()
    activated = torch.zeros((slots, width), dtype=torch.bfloat16, device=x.device)
    for slot, expert in enumerate(ids.view(-1).tolist()):
        if expert >= 0:
            both = (x[slot // ids.shape[1]].float() @ w1[expert].float().T).bfloat16()
            gate, up = both[:width].float(), both[width:]
            activated[slot] = (gate / (1 + torch.exp(-gate))).bfloat16() * up
    return activated


def reference_down(activated, w2, weights, ids):
    out = torch.zeros((ids.numel(), w2.shape[1]), dtype=torch.bfloat16, device=w2.device)
    for slot, expert in enumerate(ids.view(-1).tolist()):
        if expert >= 0:
            result = activated[slot].float() @ w2[expert].float().T
            out[slot] = (result * weights.view(-1)[slot]).bfloat16()
    return out


def sort(ids, block_m, experts=8):
    """As vLLM does, with -1 as a group of its own and garbage behind what is used."""
    order, block_expert = [], []
    for expert in range(-1, experts):
        slots = (ids.view(-1) == expert).nonzero().view(-1).tolist()
        slots += [ids.numel()] * (-len(slots) % block_m)
        order += slots
        block_expert += [expert] * (len(slots) // block_m)
    used = len(order)

    def int32(values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    return Slots(
        int32(order + [10**6] * (4 * block_m)), int32(block_expert + [-7] * 4), int32([used])
    )


def one_per_block(ids, block_m):
    padded = torch.tensor([ids.numel() * block_m], dtype=torch.int32, device=DEVICE)
    return Slots(None, ids.reshape(-1), padded)


@pytest.mark.gpu
@pytest.mark.parametrize("sorting", [sort, one_per_block])
@pytest.mark.parametrize("tile", GRIDS, ids=["grid", "persistent", "high"])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_gemms_are_the_reference(shape, tile, sorting):
    rows, top_k, hidden, width = shape
    torch.manual_seed(rows)
    x, w1, w2 = eighths(rows, hidden), eighths(8, 2 * width, hidden), eighths(8, hidden, width)
    activated, weights = eighths(rows * top_k, width), torch.rand(rows, top_k, device=DEVICE)
    ids = torch.rand(rows, 8).argsort(-1)[:, :top_k].int().to(DEVICE)
    ids[0] = int(ids[0, 0])  # re-routing may name an expert twice in a row
    ids[-1, -1] = -1
    slots = sorting(ids, tile.block_m)
    found, out = torch.full_like(activated, 9), torch.full_like(w2[0, :, :1], 9)
    out = out.view(1, hidden).repeat(rows * top_k, 1)
    gate_up(x, w1, found, slots, top_k, tile)
    down(activated, w2, weights, out, slots, tile)
    assert torch.equal(found, reference_gate_up(x, w1, ids))
    assert torch.equal(out, reference_down(activated, w2, weights, ids))


# --- against vLLM, on a GPU ---------------------------------------------------------------------


class Stock:
    """Random experts, and what vLLM computes with them."""

    tile = {  # noqa: RUF012
        "BLOCK_SIZE_M": 16,
        "BLOCK_SIZE_N": 64,
        "BLOCK_SIZE_K": 128,
        "GROUP_SIZE_M": 1,
        "num_warps": 4,
        "num_stages": 3,
    }

    def __init__(self, experts, top_k, hidden, width):
        self.experts, self.top_k, self.hidden, self.width = experts, top_k, hidden, width
        torch.manual_seed(0)
        self.w1 = torch.randn(experts, 2 * width, hidden, device=DEVICE).bfloat16() * 0.05
        self.w2 = torch.randn(experts, hidden, width, device=DEVICE).bfloat16() * 0.05

    def batch(self, rows, named):
        """A batch whose slots name so many experts."""
        x = torch.randn(rows, self.hidden, device=DEVICE).bfloat16()
        ids = torch.randint(0, named, (rows, self.top_k), dtype=torch.int32, device=DEVICE)
        return x, torch.rand(rows, self.top_k, device=DEVICE), ids

    def sort(self, ids, rows, block_m):
        from vllm.model_executor.layers.fused_moe.fused_moe import _prepare_expert_assignment

        block = {"BLOCK_SIZE_M": block_m}
        return Slots(*_prepare_expert_assignment(ids, block, rows, self.top_k, self.experts, None))

    def run(self, x, weights, slots, block_m=16):
        from vllm.model_executor.layers.fused_moe.fused_moe import invoke_fused_moe_triton_kernel
        from vllm.triton_utils import tl

        rows, slot_count = len(x), weights.numel()
        both = x.new_empty(rows, self.top_k, 2 * self.width)
        activated = x.new_empty(slot_count, self.width)
        out = x.new_empty(rows, self.top_k, self.hidden)
        names = ("fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16")
        common = {
            "config": {**self.tile, "BLOCK_SIZE_M": block_m},
            "compute_type": tl.bfloat16,
            "per_channel_quant": False,
            **{f"use_{name}": False for name in names},
        }
        invoke_fused_moe_triton_kernel(
            x, self.w1, both, None, None, None, *slots, False, self.top_k, **common
        )
        torch.ops._C.silu_and_mul(activated, both.view(-1, 2 * self.width))
        invoke_fused_moe_triton_kernel(
            activated, self.w2, out, None, None, weights, *slots, True, 1, **common
        )
        return activated, out.view(-1, self.hidden)

    def fused(self, x, weights, slots, first, second):
        activated = x.new_full((weights.numel(), self.width), 9)
        out = x.new_full((weights.numel(), self.hidden), 9)
        gate_up(x, self.w1, activated, slots, self.top_k, first)
        down(activated, self.w2, weights, out, slots, second)
        return activated, out


TILES = [
    (Tile(16, 32, 128), Tile(16, 64, 128)),
    (Tile(16, 16, 64, num_stages=5), Tile(16, 32, 256)),
    (Tile(16, 64, 128, num_warps=8, programs=1), Tile(16, 128, 64, programs=2)),
    (Tile(16, 32, 128, programs=3, overlap=True), Tile(16, 64, 128, overlap=True, ahead=512)),
    (Tile(16, 32, 256, overlap=True), Tile(16, 64, 128, programs=2, overlap=True, ahead=64)),
    (Tile(32, 32, 128), Tile(32, 64, 128, programs=1, overlap=True)),
]


@pytest.fixture(scope="module", params=[(32, 8, 2048, 768), (16, 6, 2048, 1408)])
def stock(request):
    return Stock(*request.param)


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(("rows", "named"), [(1, 16), (4, 3), (16, 15), (33, 16), (128, 9)])
def test_bits_of_vllm(stock, rows, named, tiles):
    x, weights, ids = stock.batch(rows, named)
    slots = stock.sort(ids, rows, tiles[0].block_m)
    for wanted, found in zip(
        stock.run(x, weights, slots, tiles[0].block_m),
        stock.fused(x, weights, slots, *tiles),
        strict=True,
    ):
        assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_rows_of_large_values_have_vllms_bits(stock):
    """Where ``exp(-gate)`` overflows or vanishes, and everything between."""
    x, weights, ids = stock.batch(64, 16)
    x *= torch.logspace(-6, 3, 64, device=DEVICE)[:, None].bfloat16()
    slots = stock.sort(ids, 64, 16)
    for wanted, found in zip(
        stock.run(x, weights, slots), stock.fused(x, weights, slots, *TILES[0]), strict=True
    ):
        assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [TILES[0], TILES[3], TILES[4]])
def test_a_graph_follows_its_slots(stock, tiles):
    """One capture; batches that need few blocks, then many."""
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    x, weights, ids = stock.batch(32, 1)
    experts = stock.experts
    results = []

    def step():
        slots = Slots(*moe_align_block_size(ids, 16, experts, None))
        results[:] = [slots, *stock.fused(x, weights, slots, *tiles)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for named in (1, 16, 2, 16, 5):
        _, _, other = stock.batch(32, named)
        ids.copy_(other)
        graph.replay()
        for wanted, found in zip(stock.run(x, weights, results[0]), results[1:], strict=True):
            assert torch.equal(found, wanted)


# --- in vLLM's place ----------------------------------------------------------------------------


def plain_experts():
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    experts = object.__new__(TritonExperts)
    experts.quant_config = SimpleNamespace(
        quant_dtype=None,
        block_shape=None,
        weight_quant_dtype=None,
        w1_scale=None,
        w2_scale=None,
        w1_bias=None,
        w2_bias=None,
    )
    experts.activation_config = SimpleNamespace(clamp_limit=None)
    experts.quantization_emulation = False
    experts.moe_sum = lambda gathered, output, ids, expert_map: output.copy_(gathered.sum(1))
    return experts


def plain_call(rows=3, top_k=2, hidden=64, width=32):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return {
        "output": torch.zeros(rows, hidden, device=DEVICE).bfloat16(),
        "hidden_states": eighths(rows, hidden),
        "w1": eighths(8, 2 * width, hidden),
        "w2": eighths(8, hidden, width),
        "topk_weights": torch.rand(rows, top_k, device=DEVICE),
        "topk_ids": torch.randint(0, 8, (rows, top_k), device=DEVICE),
        "activation": MoEActivation.SILU,
        "global_num_experts": 8,
        "expert_map": None,
        "a1q_scale": None,
        "a2_scale": None,
        "workspace13": eighths(rows, top_k, hidden),
        "workspace2": eighths(rows, top_k, hidden),
        "expert_tokens_meta": None,
        "apply_router_weight_on_input": False,
    }


@pytest.fixture
def fused(monkeypatch):
    """`apply_experts` with tiles for every batch, and torch in the place of the kernels."""
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    from sere_ray.engine.gpu import gate_up as kernels

    tiles = fused_experts.Tiles(Tile(16, 16, 64), Tile(16, 16, 64))
    monkeypatch.setattr(fused_experts, "tiles_for", lambda experts, width, rows, fp8: tiles)

    def sort(ids, block, rows, top_k, experts, expert_map, ignore_invalid_experts):
        assert experts == 8
        assert ignore_invalid_experts == (expert_map is not None)
        return None, ids if expert_map is None else expert_map[ids], torch.tensor([0])

    monkeypatch.setattr(triton_moe, "_prepare_expert_assignment", sort)

    def compute_gate_up(x, w1, activated, slots, top_k, tile):
        activated.copy_(reference_gate_up(x, w1, slots.block_expert))

    def compute_down(activated, w2, weights, out, slots, tile):
        out.copy_(reference_down(activated, w2, weights, slots.block_expert))

    monkeypatch.setattr(kernels, "gate_up", compute_gate_up)
    monkeypatch.setattr(kernels, "down", compute_down)

    def apply(experts, call):
        called = []
        fused_experts.apply_experts(lambda *_, **found: called.append(found), experts, **call)
        assert called in ([], [call])
        return not called

    return apply


def test_a_plain_batch_is_computed_here(fused):
    call = plain_call()
    x, w1, w2, weights, ids = (
        call[name] for name in ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    )
    activated = reference_gate_up(x, w1, ids)
    wanted = reference_down(activated, w2, weights, ids).view(*ids.shape, -1).sum(1)
    assert fused(plain_experts(), call)
    assert torch.equal(call["output"], wanted)


def test_a_rank_computes_its_own_experts(fused):
    """The reference gives zeros where an expert is -1."""
    call, local = plain_call(), torch.tensor([-1, 0, -1, 1, -1, 2, -1, 3])
    call |= {name: call[name][local >= 0].contiguous() for name in ("w1", "w2")}
    call["expert_map"] = local
    x, weights, ids = (call[name] for name in ("hidden_states", "topk_weights", "topk_ids"))
    activated = reference_gate_up(x, call["w1"], local[ids])
    wanted = reference_down(activated, call["w2"], weights, local[ids]).view(*ids.shape, -1).sum(1)
    assert fused(plain_experts(), call)
    assert torch.equal(call["output"], wanted)


def test_other_batches_are_left_to_vllm(fused):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    call = plain_call()
    for changes in (
        {"w1": call["w1"].half()},
        {"hidden_states": call["hidden_states"].float()},
        {"w2": call["w2"].transpose(0, 1).contiguous().transpose(0, 1)},
        {"topk_weights": call["topk_weights"].bfloat16()},
        {"activation": MoEActivation.GELU},
        {"a1q_scale": torch.ones(1)},
        {"apply_router_weight_on_input": True},
    ):
        assert not fused(plain_experts(), {**call, **changes}), changes


def test_other_layers_are_left_to_vllm(fused):
    for changes in (
        {"quant_dtype": torch.float8_e4m3fn},
        {"weight_quant_dtype": "mxfp4"},
        {"w1_bias": torch.ones(1)},
        {"w2_bias": torch.ones(1)},
    ):
        experts = plain_experts()
        vars(experts.quant_config).update(changes)
        assert not fused(experts, plain_call()), changes
    for changes in (
        {"_lora_context": object()},
        {"quantization_emulation": True},
        {"activation_config": SimpleNamespace(clamp_limit=7.0)},
    ):
        experts = plain_experts()
        vars(experts).update(changes)
        assert not fused(experts, plain_call()), changes
    experts = plain_experts()
    experts.__class__ = type("Others", (type(experts),), {})
    assert not fused(experts, plain_call())


def test_shapes_without_tiles_are_left_to_vllm(tmp_path, monkeypatch):
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    monkeypatch.setattr(fused_experts, "_FOLDER", tmp_path)
    first = '{"block_m": 16, "block_n": 32, "block_k": 128}'
    second = '{"block_m": 16, "block_n": 64, "block_k": 128, "overlap": true, "ahead": 512}'
    pair = f'{{"gate_up": {first}, "down": {second}}}'
    other = pair.replace("32", "64")
    name = get_config_file_name(8, 48, None)
    (tmp_path / name).write_text(f'{{"1": {pair}, "16": {other}}}')
    assert fused_experts.tiles_for(8, 40, 1) is None
    assert fused_experts.tiles_for(8, 48, 17) is None
    found = fused_experts.tiles_for(8, 48, 4)
    assert found == (Tile(16, 32, 128), Tile(16, 64, 128, overlap=True, ahead=512))
    assert fused_experts.tiles_for(8, 48, 12).gate_up == Tile(16, 64, 128)
    assert fused_experts.tiles_for(2, 48, 4) == found  # a rank's shard of the layer
    assert fused_experts.tiles_for(6, 48, 4) is None
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    assert fused_experts.tiles_for(8, 48, 1) is None


def test_a_card_of_the_same_generation_takes_the_tiles_of_the_h200(monkeypatch, caplog):
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm.platforms import current_platform

    monkeypatch.setattr(fused_experts.logger, "handlers", [caplog.handler])
    caplog.set_level("INFO", fused_experts.logger.name)
    monkeypatch.setattr(fused_moe, "get_device_name_as_file_name", lambda: "NVIDIA_H200")
    wanted = fused_experts.tiles_for(128, 768, 16)
    assert wanted is not None
    fused_experts._load.cache_clear()
    monkeypatch.setattr(fused_moe, "get_device_name_as_file_name", lambda: "NVIDIA_H100_80GB_HBM3")
    assert fused_experts.tiles_for(128, 768, 16) is None
    assert "vLLM's: there are no tiles in E=128,N=768,device_name=NVIDIA_H100" in caplog.text
    fused_experts._load.cache_clear()
    monkeypatch.setattr(current_platform, "is_device_capability", lambda wanted: wanted == 90)
    assert fused_experts.tiles_for(128, 768, 16) == wanted
    assert fused_experts.tiles_for(64, 768, 16) == wanted
    assert caplog.text.strip().endswith("tiles in E=128,N=768,device_name=NVIDIA_H200.json")
    fused_experts._load.cache_clear()


# --- what `apply_experts` counts on in vLLM: read, not imported ----------------------------------


def method_of(owner, name):
    for node in ast.walk(tree_of(MODULE)):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            return next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == name)
    raise AssertionError(f"{owner}.{name} is gone")


def test_sequence_of_triton_experts():
    apply = method_of("TritonExperts", "apply")
    names = [argument.arg for argument in apply.args.args]
    assert names == ["self", *plain_call()]
    body = ast.unparse(apply)
    steps = [
        "_resize_cache(workspace2, (num_tokens, top_k_num, N))",
        "_resize_cache(workspace13, (num_tokens * top_k_num, cache2_dim))",
        "_resize_cache(workspace2, (num_tokens, top_k_num, K))",
        "w1.shape[0] if expert_map is None",
        "_prepare_expert_assignment(topk_ids, config, num_tokens, top_k_num, num_align_experts, "
        "expert_map,",
        "invoke_fused_moe_triton_kernel(hidden_states, w1, intermediate_cache1,",
        "self.activation(activation, intermediate_cache2, intermediate_cache1.view(-1, N))",
        "invoke_fused_moe_triton_kernel(qintermediate_cache2, w2, intermediate_cache3,",
        "self.moe_sum(intermediate_cache3, output, topk_ids, expert_map)",
    ]
    places = [body.index(step) for step in steps]
    assert places == sorted(places)
    assert "if expert_map is not None" in ast.unparse(method_of("TritonExperts", "moe_sum"))


def test_modular_kernel_names_all_arguments():
    _, body = function_of("model_executor.layers.fused_moe.modular_kernel", "_fused_experts")
    call = body[body.index("self.fused_experts.apply(") :]
    assert all(f"{name}=" in call for name in plain_call())


def test_stock_kernel_adds_and_rounds_as_ours():
    _, body = function_of("model_executor.layers.fused_moe.fused_moe", "fused_moe_kernel")
    lines = [
        "accumulator += tl.dot(a, b)",
        "accumulator *= moe_weight[:, None]",
        "accumulator = accumulator.to(compute_type)",
        "tl.store(c_ptrs, accumulator, mask=c_mask)",
    ]
    places = [body.rindex(line) for line in lines]
    assert places == sorted(places)


def test_tiles_of_other_heights_are_refused(has_words):
    with pytest.raises(ValueError) as error:
        Tile(64, 32, 128)
    has_words(str(error.value), "block_m = 64", "16", "32")
