"""Which gate a model in memory has, and the rule ``margin`` behind it."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from sere_ray.calibration.collect import find_moe_layers
from sere_ray.evaluation.decode_batches import DecodeBatches
from sere_ray.evaluation.gates import candidates, that_chose
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules.gate import SCORINGS
from sere_ray.util.errors import UnsupportedError
from tests.models import NUM_EXPERTS, TOP_K, build_checkpoint
from tests.rules.gate_cases import choose, make_gate

GROUPED = SimpleNamespace(n_group=4, topk_group=2)
KINDS = {"deepseek_v2": ("softmax", False, 4), "deepseek_v3": ("sigmoid", True, 4)}


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("bias", [0.0, 0.3])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_gate_is_known_by_what_it_chose(scoring, bias, groups):
    gate = make_gate(scoring, experts=16, bias=bias, groups=groups)
    logits = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    ids, weights = choose(logits, gate, slots=4, top_groups=2)
    config = GROUPED if groups > 1 else SimpleNamespace()
    found = that_chose(candidates(config, gate.bias, 16), logits, ids, 2.5 * weights, 3)
    assert (found.scoring, found.group_size) == (scoring, gate.group_size)
    assert (found.bias is None) == (gate.bias is None)


def test_a_gate_that_chooses_otherwise_is_refused(has_words):
    logits = torch.tensor([[0.5, 0.3, 0.2]])
    for ids, weights in (([[0, 2]], [[0.6, 0.4]]), ([[0, 1]], [[0.9, 0.1]])):
        chosen = torch.tensor(ids), torch.tensor(weights)
        with pytest.raises(UnsupportedError) as caught:
            that_chose(candidates(SimpleNamespace(), None, 3), logits, *chosen, 3)
        has_words(str(caught.value), "layer 3", "softmax", "leave out")


@pytest.mark.parametrize("architecture", KINDS)
def test_margin_behind_the_gates_of_deepseek(architecture, tmp_path, has_words):
    folder = build_checkpoint(architecture, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scoring, biased, groups = KINDS[architecture]
    for layer in find_moe_layers(model).values():
        gates = candidates(model.config, layer.selection_bias, NUM_EXPERTS)
        assert all((gate.bias is not None) == biased for gate in gates)
        assert (scoring, NUM_EXPERTS // groups) in {(g.scoring, g.group_size) for g in gates}
    ids = torch.randint(10, 1000, (4, 12), generator=torch.Generator().manual_seed(1))
    batches = DecodeBatches(model, ids, 4, {})
    common = {"mode": "on", "select_top_k": TOP_K, "threshold": None}
    policy = BoundPolicy(rule="margin", min_primary_experts=TOP_K, knobs=(("tau", 0.05),), **common)
    found = batches.measure(policy, 4)
    assert found.kl.mean() > 1e-6
    exact = BoundPolicy(rule="margin", min_primary_experts=TOP_K, knobs=(("tau", 0.0),), **common)
    assert found.reads.mean() < batches.measure(exact, 4).reads.mean()
    assert batches.measure(policy, 1).kl.max() < 1e-5, "a batch of one is exact"
    peer = BoundPolicy(rule="xshare", min_primary_experts=0, knobs=(("experts", 6),), **common)
    with pytest.raises(UnsupportedError) as caught:
        batches.measure(peer, 4)
    has_words(str(caught.value), "bias, groups", "compare sere and margin")
