"""What vLLM's routers rank by, and the rule ``margin`` behind them in a real engine."""

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

from sere_ray.engine.control import read_counters
from sere_ray.engine.cpu.state import CpuState
from sere_ray.engine.gate import is_hashed, read_gate, with_bias
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, REROUTABLE, Layer
from sere_ray.rules.gate import Gate, in_units, scores_of
from sere_ray.rules.margin import margin
from sere_ray.util.errors import UnsupportedError
from tests.engine.conftest import generate, prompts, running_engine, sere_key
from tests.engine.test_cpu_union import EXPERTS, make_artifact
from tests.models import MOE_LAYERS, NUM_EXPERTS, TOP_K

SIZES = {"top_k": 2, "global_num_experts": 8}
GROUPS = {"num_expert_group": 4, "topk_group": 2}
BIAS = torch.tensor([1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])


class Renamed(FusedTopKRouter):
    """Of another model, with another choice perhaps."""


@pytest.mark.parametrize(
    ("router", "scoring", "has_bias", "group_size"),
    [
        (CPURouter(**SIZES), "softmax", False, 0),
        (CPURouter(**SIZES, e_score_correction_bias=BIAS), "softmax", False, 0),
        (CPURouter(**SIZES, use_grouped_topk=True, **GROUPS), "softmax", False, 2),
        (
            CPURouter(
                **SIZES,
                **GROUPS,
                use_grouped_topk=True,
                scoring_func="sigmoid",
                e_score_correction_bias=BIAS,
            ),
            "sigmoid",
            True,
            2,
        ),
        (
            CPURouter(**SIZES, scoring_func="sqrtsoftplus", e_score_correction_bias=BIAS),
            "sqrtsoftplus",
            True,
            0,
        ),
        (FusedTopKRouter(**SIZES), "softmax", False, 0),
        (FusedTopKRouter(**SIZES, scoring_func="sigmoid"), "sigmoid", False, 0),
        (
            FusedTopKBiasRouter(**SIZES, scoring_func="softmax", e_score_correction_bias=BIAS),
            "softmax",
            True,
            0,
        ),
        (GroupedTopKRouter(**SIZES, **GROUPS), "softmax", False, 2),
        (
            GroupedTopKRouter(
                **SIZES,
                num_expert_group=1,
                topk_group=1,
                scoring_func="sigmoid",
                e_score_correction_bias=BIAS,
            ),
            "sigmoid",
            True,
            0,
        ),
        (GroupedTopKRouter(**SIZES, num_expert_group=4, topk_group=4), "softmax", False, 0),
    ],
)
def test_what_a_router_ranks_by(router, scoring, has_bias, group_size):
    gate = read_gate(router)
    assert (gate.scoring, gate.bias is not None, gate.group_size) == (scoring, has_bias, group_size)
    assert not is_hashed(router)
    if has_bias:
        shifted = with_bias(gate, router).bias
        assert torch.equal(shifted, BIAS - 3)
        assert BIAS.tolist()[1] == 3.0, "the router keeps its own"


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (Renamed(**SIZES), "router = Renamed"),
        (CPURouter(**SIZES, custom_routing_function=lambda **_: None), "custom_routing_function"),
        (CPURouter(**SIZES, scoring_func="cubic"), "scoring_func = cubic"),
        (
            GroupedTopKRouter(top_k=2, global_num_experts=128, num_expert_group=64, topk_group=2),
            "num_expert_group = 64",
        ),
    ],
)
def test_what_rules_cannot_read(router, reason):
    with pytest.raises(UnsupportedError, match=reason):
        read_gate(router)


def test_a_table_of_token_ids_is_known():
    table = torch.zeros((10, 2), dtype=torch.int32)
    for router in (
        CPURouter(**SIZES, scoring_func="sqrtsoftplus", hash_indices_table=table),
        FusedTopKBiasRouter(**SIZES, scoring_func="sqrtsoftplus", hash_indices_table=table),
    ):
        assert is_hashed(router)


@pytest.mark.parametrize("rule", [{"select_top_k": 1}, {"rule": "margin", "tau": 0.5}])
def test_layers_that_a_table_routes_stay_exact(rule):
    state = CpuState(Policy.parse({"similarity": "f", **rule}), make_artifact(), 3, 64)
    assert state.layers[:2] == [0, 1]
    for layer in state.layers:
        table = torch.zeros(9, 2) if layer == 0 else None
        state.note_gate(layer, CPURouter(**SIZES, hash_indices_table=table))
    scores = torch.rand((8, EXPERTS), generator=torch.Generator().manual_seed(0))
    weights, ids = scores.topk(3)
    with state.step(np.full(8, REROUTABLE, dtype=np.int8)):
        new = [state.choose(layer, ids.int(), weights, scores) for layer in (0, 1)]
    assert torch.equal(new[0][0], ids.int())
    assert torch.equal(new[0][1], weights)
    assert not torch.equal(new[1][0], ids.int())
    before, after, slots = state.read_layer_counters()[0, 0, :3]
    assert before == after > 0
    assert slots == 0


# --- in an engine ---------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3"])
def test_margin_behind_groups_and_a_bias(architecture, checkpoint, monkeypatch):
    """On the very logits ``==`` the torch rule; and vLLM does rank as the gate that was read."""
    calls, original = [], CpuState.choose

    def record(self, layer, ids, weights, logits, hidden):
        new = original(self, layer, ids, weights, logits, hidden)
        kinds = self.row_kind[: len(ids)]
        calls.append([layer, self.gates.known[layer]])
        calls[-1] += [part.clone() for part in (ids, weights, logits, kinds, *new)]
        return new

    monkeypatch.setattr(CpuState, "choose", record)
    folder = checkpoint(architecture)
    key = sere_key(folder, rule="margin", select_top_k=None, tau=0.05, min_primary_experts=4)
    with running_engine(folder, {k: v for k, v in key.items() if v is not None}) as engine:
        generate(engine, prompts(8, seed=2), tokens=6)
        decode = read_counters(engine)["decode_only"]
    knobs = Policy.parse({"similarity": "f", "rule": "margin", "tau": 0.05}).for_model(top_k=TOP_K)
    changed = 0
    for layer, gate, ids, weights, logits, kinds, new_ids, new_weights in calls:
        assert gate.group_size == NUM_EXPERTS // 4
        assert (gate.scoring, gate.bias is None) == {
            "deepseek_v2": ("softmax", True),
            "deepseek_v3": ("sigmoid", False),
        }[architecture]
        scores = scores_of(logits, gate)
        check_is_best(ids.long(), scores, gate)
        of_layer = knobs.of_layer(layer, NUM_EXPERTS, None)
        of_layer = Layer(**{**vars(of_layer), "gate": gate})
        expected_ids, expected_weights = margin(ids, weights, scores, kinds, of_layer)
        if REROUTABLE in kinds:
            kept = expected_ids >= 0
            assert torch.equal(new_ids[kept], expected_ids[kept])
            assert torch.equal(new_weights, expected_weights)
        assert torch.equal(new_ids[kinds == EXACT], ids[kinds == EXACT])
        changed += int((new_ids != ids).any())
    assert changed > 4
    assert len(decode["experts_after"]) == len(MOE_LAYERS[architecture])
    pairs = zip(decode["experts_after"], decode["experts_before"], strict=True)
    assert all(after < before for after, before in pairs)


def check_is_best(ids, scores, gate):
    """No expert that the rows might have chosen ranks above one that they chose."""
    ranks = in_units(scores, ids, gate).ranks
    others = ranks.scatter(1, ids, -(2**31))
    rounding = 4
    assert (others.amax(dim=1) <= ranks.gather(1, ids).amin(dim=1) + rounding).all()
    without = in_units(scores, ids, Gate(gate.scoring)).ranks
    assert not torch.equal(without, ranks), "groups and bias matter here"
