"""Learned masks in the state of a GPU engine, without a GPU: its kernels run in the emulator.

The engines themselves: ``test_gpu_masks.py``.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from sere_ray.engine.gpu.mask_router import MaskRouter, check_stackable
from sere_ray.engine.gpu.state import CudaState
from sere_ray.engine.option_checks import check_masks
from sere_ray.masks.compose import after_masks
from sere_ray.masks.slots import kept_by
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, REROUTABLE
from sere_ray.rules.gate import PLAIN
from sere_ray.util.errors import ArtifactError, UnsupportedError
from tests.engine.test_cpu_union import LAYERS, make_statistics
from tests.engine.test_cuda_union import Group, emulated
from tests.kernel.emulator import COMPILER
from tests.kernel.kernel_cases import check_aligned
from tests.kernel.margin_cases import EMULATED, scores_of
from tests.masks.made import make_masks

__all__ = ["emulated"]

E, K, H = 32, 4, 24
CPU = torch.device("cpu")
KINDS = np.array([REROUTABLE] * 6 + [EXACT, REROUTABLE], dtype=np.int8)
MARGIN = {"rule": "margin", "tau": 0.02, "min_primary_experts": 0}
RULES = [{"rule": "none"}, {"select_top_k": 1, "min_primary_experts": 2}, MARGIN]


# --- the products ---------------------------------------------------------------------------------


class PlainGate(nn.Module):
    """As vLLM's: a pair of logits and nothing."""

    return_bias = True

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return nn.functional.linear(rows, self.weight), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_product_gives_the_logits_of_gate_and_masks(dtype):
    weight, mask = torch.randn(2, E, H).to(dtype)
    gate, rows = PlainGate(weight), torch.randn(7, H).to(dtype)
    plain = gate(rows)[0]
    router = MaskRouter(gate)
    address = router.weight.data_ptr()
    assert gate.weight.data_ptr() == address, "the gate's weight is not kept twice"
    assert torch.equal(gate.weight, weight)
    assert bool((_logits(router, gate, rows)[1] == 0).all()), "at the start nothing is masked"
    router.write(mask.float())
    of_gate, of_mask = _logits(router, gate, rows)
    assert router.weight.data_ptr() == address, "captured graphs point to it"
    assert router.weight.shape == (2 * E, H)
    torch.testing.assert_close(of_gate, plain)
    torch.testing.assert_close(of_mask, nn.functional.linear(rows, mask))
    assert of_gate.is_contiguous()
    assert of_mask.is_contiguous()


def _logits(router, gate, rows):
    logits, nothing = gate(rows)
    assert nothing is None
    return logits, router.take_logits(0, logits)


def test_masks_of_other_rows_are_refused():
    gate = PlainGate(torch.randn(E, H))
    router = MaskRouter(gate)
    logits, _ = gate(torch.randn(3, H))
    with pytest.raises(UnsupportedError, match=r"sere.masks: layer 5 was given logits \(4, 32\)"):
        router.take_logits(5, torch.zeros(4, E))
    with pytest.raises(UnsupportedError, match="layer 5"):  # they were taken before
        router.take_logits(5, logits)


# --- the state ------------------------------------------------------------------------------------


def make_state(keys, *, keep_first=False, merges=False, with_artifact=True, level=1):
    """A GPU engine's with layers whose gates are plain."""
    shapes = dict.fromkeys(range(LAYERS), (E, H))
    masks = make_masks(shapes, dict.fromkeys(shapes, "0" * 32), top_k=K, keep_first=keep_first)
    files = {"similarity": "a"} if with_artifact else {}
    policy = Policy.parse({**files, "masks": "m", "level": level, **keys})
    artifact = make_artifact() if with_artifact else None
    state = CudaState(policy, artifact, K, E, 64, CPU, masks=masks)
    generator = torch.Generator().manual_seed(3)
    for layer in range(LAYERS):
        gate = PlainGate(torch.randn(E, H, generator=generator))
        state.attached[layer] = SimpleNamespace(gate=gate, moe_config=SimpleNamespace(ep_size=1))
        state.gates.known[layer] = PLAIN
        state.mask_routers[layer] = MaskRouter(gate)
    state._write_masks()
    state.rule.note_experts("l", merges=merges)
    return state


def make_artifact():
    generator = torch.Generator().manual_seed(1)
    artifact = Group().states[0].artifact
    matrices = {i: torch.rand(E, E, generator=generator) for i in range(LAYERS)}
    return artifact.__class__(matrices, artifact.metadata, {})


def run_layer(state, layer, seed, way):
    """A layer's rows through its gate and the state: what it was given, and what it made of it."""
    hidden = torch.randn(len(KINDS), H, generator=torch.Generator().manual_seed(seed))
    logits, _ = state.attached[layer].gate(hidden)
    mask_logits = state.mask_logits_of(layer, logits)
    weights, ids = logits.softmax(-1).topk(K)
    gate = ids.int(), weights.clone(), logits, mask_logits
    if way == "chooses":
        held = state.own.defer_routing(layer, logits, None, mask_logits, renormalize=False)
        new_weights, new_ids = state.hold(held)
    else:
        new_ids, new_weights = ids.int(), weights.clone()
        state.reroute(layer, new_ids, new_weights, logits, mask_logits, sorts=way == "sorts")
    if way != "alone":
        check_aligned(new_ids, state.align(new_ids, 16), 16, E)
    state.check_nothing_deferred()
    return gate, (new_ids, new_weights)


def expected(state, layer, gate):
    """By the specification; dropped slots are id -1."""
    ids, weights, logits, mask_logits = gate
    kinds, bound = torch.from_numpy(KINDS), state.bound.for_rows(7)
    kept = torch.ones_like(ids, dtype=torch.bool)
    if bound.level:
        of_slots = mask_logits.gather(1, ids.long())
        keep_first = state.masks.metadata.keep_first
        kept = kept_by(of_slots, ids, weights, kinds, num_experts=E, keep_first=keep_first)
    matrix = None if state.artifact is None else state.artifact.layers[layer]
    knobs = bound.of_layer(layer, E, matrix, None, make_statistics(layer))
    scores = scores_of(logits, PLAIN, EMULATED)
    return kept, after_masks(bound.rule, kept, ids, weights, scores, kinds, knobs)


@pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernel with")
@pytest.mark.usefixtures("emulated")
class TestState:
    """Steps of a state whose launches run in the emulator."""

    @pytest.mark.parametrize("way", ["alone", "sorts", "chooses"])
    @pytest.mark.parametrize("keys", RULES, ids=lambda keys: keys.get("rule", "sere"))
    def test_levels_move_between_steps(self, keys, way):
        """``==`` with the specification, whatever launch; exact rows have the gate's ids."""
        state, masked, was_masked = make_state(keys, merges=True), 0, set()
        for step, level in enumerate((1, 2, 0, 1)):
            state.set_policy({"similarity": "a", "masks": "m", **keys, "level": level})
            state.begin_step(KINDS)
            for layer in range(LAYERS):
                gate, found = run_layer(state, layer, 10 * step + layer, way)
                kept, wanted = expected(state, layer, gate)
                assert torch.equal(found[0], wanted[0])
                torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-7)
                assert torch.equal(found[0][6], gate[0][6])
                masked += int((~kept).sum())
                was_masked.add((level, bool((~kept).any())))
        assert was_masked == {(0, False), (1, True), (2, True)}
        counted = state.read_counters(reset=True)["mixed"]
        assert sum(counted["slots_masked"]) == masked
        assert sum(counted["experts_after"]) < sum(counted["experts_before"])
        assert sum(state.read_counters(reset=False)["mixed"]["slots_masked"]) == 0

    def test_first_choices_stay_where_masks_were_trained_so(self):
        state = make_state({"rule": "none"}, keep_first=True, merges=True)
        state.begin_step(KINDS)
        gate, found = run_layer(state, 0, 1, "alone")
        assert torch.equal(found[0][:, 0], gate[0][:, 0])
        assert bool((found[0] < 0).any())
        assert torch.equal(found[0], expected(state, 0, gate)[1][0])

    def test_experts_that_skip_no_slot_get_an_expert_of_the_row(self):
        """Of vLLM's Triton experts: no more is read, and the weight is 0."""
        state = make_state({"rule": "none"}, merges=False)
        state.begin_step(KINDS)
        gate, (ids, weights) = run_layer(state, 0, 1, "sorts")
        kept, wanted = expected(state, 0, gate)
        assert torch.equal(ids[kept], wanted[0][kept])
        assert torch.equal(weights, wanted[1])
        assert set(ids.unique().tolist()) == set(wanted[0][kept].unique().tolist())

    @pytest.mark.parametrize("keys", [RULES[0], MARGIN], ids=lambda keys: keys["rule"])
    def test_masks_do_without_an_artifact(self, keys):
        state = make_state(keys, with_artifact=False, merges=True)
        state.begin_step(KINDS)
        gate, found = run_layer(state, 1, 4, "sorts")
        assert torch.equal(found[0], expected(state, 1, gate)[1][0])

    def test_a_level_that_does_not_exist_changes_nothing(self):
        state = make_state({"rule": "none"})
        before = [router.weight.clone() for router in state.mask_routers.values()]
        with pytest.raises(ArtifactError, match=r"level = 3: m has levels 1\.\.2"):
            state.set_policy({"rule": "none", "masks": "m", "level": 3, "similarity": "a"})
        after = [router.weight for router in state.mask_routers.values()]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "sleeps", "words"),
    [
        (2, False, "sere.masks: an engine of 2 GPUs: ranks do not tell each other"),
        (1, True, "sere.masks: enable_sleep_mode = True"),
    ],
)
def test_options_that_masks_were_not_built_for(ranks, sleeps, words):
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size_across_dp=ranks),
        model_config=SimpleNamespace(enable_sleep_mode=sleeps),
    )
    with pytest.raises(UnsupportedError, match=words):
        check_masks(config)


def vllm_gate(dtype=torch.bfloat16, **changes):
    """vLLM's, without its groups of ranks, in a layer's runner."""
    gate = GateLinear.__new__(GateLinear)
    nn.Module.__init__(gate)
    gate.weight = nn.Parameter(torch.zeros(E, H, dtype=dtype), requires_grad=False)
    settings = {
        "quant_method": UnquantizedLinearMethod(),
        "bias": None,
        "out_dtype": None,
        "allow_fp32_router_gemm": False,
        "allow_bf16x3_router_gemm": False,
    }
    for name, value in (settings | changes).items():
        setattr(gate, name, value)
    config = SimpleNamespace(in_dtype=torch.bfloat16)
    return SimpleNamespace(
        gate=gate, layer_name="l.experts", moe_config=config, _fse_fuse_gate=False
    )


class OtherGate(GateLinear):
    """Of a model that does more."""

    def forward(self, x):
        return super().forward(x)


def test_gates_that_masks_share_no_product_with_are_refused():
    check_stackable(vllm_gate())
    runners = {
        "called outside the layer": SimpleNamespace(**{**vars(vllm_gate()), "gate": None}),
        "with another one": SimpleNamespace(**{**vars(vllm_gate()), "_fse_fuse_gate": True}),
        "quantised": vllm_gate(quant_method=object()),
        "a bias": vllm_gate(bias=nn.Parameter(torch.zeros(E))),
        "of torch.float32 and rows of torch.bfloat16": vllm_gate(torch.float32),
        "logits of torch.float32": vllm_gate(out_dtype=torch.float32),
        "for its very shape": vllm_gate(allow_fp32_router_gemm=True),
    }
    other = vllm_gate()
    other.gate.__class__ = OtherGate
    runners["of its own, OtherGate"] = other
    for words, runner in runners.items():
        with pytest.raises(UnsupportedError, match=rf"sere.masks: layer 'l.experts' .*{words}"):
            check_stackable(runner)
