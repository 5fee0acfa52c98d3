"""``replicas: by_experts`` on GPU engines, without a GPU: the kernels run in the emulator.

Two ranks of one process agree on a layer; then each maps its ids where vLLM's router does.
"""

from types import SimpleNamespace

import pytest
import torch

from sere_ray.engine.gpu import copies
from sere_ray.policy.startup import Startup
from sere_ray.rules import PADDING, REROUTABLE
from sere_ray.rules.common import named_by
from sere_ray.rules.replicas import by_tokens, choose_replicas
from sere_ray.util.errors import PolicyError
from tests.engine.test_cuda_union import (
    LAYERS,
    MARGIN,
    PASSES,
    RANKS,
    E,
    Group,
    emulated,
    needs_compiler,
    padded,
)
from tests.rules.test_replicas import draw

__all__ = ["emulated"]
LAYER, REDUNDANT = 2, 6
ALONE = {"rule": "none", "similarity": None, "select_top_k": None, "min_primary_experts": None}
"""No routing changes, and there is no artifact."""
STARTUP = Startup(replicas="by_experts")


def balanced(seed):
    """vLLM's state of a layer with copies, as its routers hold it."""
    _, replicas, per_rank = draw(seed, E, REDUNDANT, RANKS)
    return SimpleNamespace(
        expert_load_view=torch.zeros(E + REDUNDANT, dtype=torch.int32),
        logical_to_physical_map=replicas,
        logical_replica_count=(replicas >= 0).sum(dim=1),
        should_record_tensor=torch.tensor(True),
        num_unpadded_tokens_tensors=[torch.tensor(1000, dtype=torch.int32)],
    ), per_rank


def by_vllm(topk_ids):
    raise AssertionError("vLLM's own map was asked")


def routers_of(group):
    routers = []
    for state in group.states:
        router = SimpleNamespace(sere_state=state, _apply_eplb_mapping=by_vllm, eplb_state=None)
        copies.choose_copies(router, state)
        routers.append(router)
    return routers


@needs_compiler
@pytest.mark.parametrize(
    "keys", [{}, {"select_top_k": 4}, MARGIN, {**MARGIN, "mode": "observe"}, ALONE]
)
def test_ranks_read_an_expert_from_one_copy(emulated, keys):
    """Whatever the rule, nothing re-routed (S = K, none) and observing among them."""
    group = Group(startup=STARTUP, **keys)
    routers, chosen_apart = routers_of(group), 0
    for seed, (kinds, sizes) in enumerate(PASSES.values()):
        before, _, after = group.run_pass(kinds, sizes, seed=seed, gathers=False)[LAYER]
        assert keys is not ALONE or torch.equal(before, after[0])
        ids, row_kind = after[0], padded(kinds, sizes)  # the same on both ranks
        active = REROUTABLE in row_kind
        named = named_by(ids, (row_kind != PADDING) & active, E)
        balancer, per_rank = balanced(seed)  # another map in every pass
        chosen = choose_replicas(named, balancer.logical_to_physical_map, per_rank=per_rank)
        for router, own in zip(routers, ids.split(list(sizes)), strict=True):
            router.eplb_state = balancer
            physical = router._apply_eplb_mapping(own)
            known, logical = own >= 0, own.clamp(min=0).long()
            hashed = by_tokens(logical, balancer.logical_to_physical_map)
            expected = torch.where(chosen[logical] >= 0, chosen[logical], hashed)
            assert torch.equal(physical, torch.where(known, expected, -1).int())
            chosen_apart += int((expected != hashed)[known].sum())
        counted = balancer.expert_load_view.sum()
        assert counted == (ids >= 0).sum()
    assert chosen_apart


@needs_compiler
def test_passes_of_many_rows_are_left_to_vllm(emulated, monkeypatch):
    group = Group()
    routers = routers_of(group)
    group.run_pass(*PASSES["full"], gathers=False)
    monkeypatch.setattr(copies, "MAX_ROWS", 7)
    routers[0].eplb_state, _ = balanced(0)
    with pytest.raises(AssertionError, match="own map"):
        routers[0]._apply_eplb_mapping(torch.zeros(8, 4, dtype=torch.int32))


@needs_compiler
def test_an_engine_without_files_counts_the_layers_that_it_has(emulated):
    """The model has four layers, two with experts, which no file says."""
    group = Group(startup=STARTUP, **ALONE)
    routers_of(group)
    state = group.states[0]
    for layer in LAYERS:
        state.attached[layer] = SimpleNamespace(
            router=None, moe_config=SimpleNamespace(ep_size=RANKS)
        )
    state.loaded()
    kinds, sizes = PASSES["full"]
    passed = group.run_pass(kinds, sizes, gathers=False)
    report = state.read_counters(reset=True)
    assert report["layers"] == list(LAYERS)
    found = report["decode_only"]
    named = [len(before.unique()) for before, _, _ in passed.values()]
    assert found["experts_before"] == found["experts_after"] == named
    assert found["slots_rerouted"] == [0, 0]
    assert {len(of_kind["experts_read"]) for of_kind in report["gathered"].values()} == {2}


@needs_compiler
def test_what_an_engine_without_files_can_change_to(emulated, has_words):
    state = Group(startup=STARTUP, **ALONE).states[0]
    for mode in ("off", "observe", "on"):
        assert state.set_policy({"rule": "none", "mode": mode}).mode == mode
    state.run_common(3, 3, same_checksum=True)
    assert state.bound.mode == "on"
    for keys, words in {
        ("rule", "sere"): ["sere.similarity is missing"],
        ("union", "local"): ["sere.union = 'local'", "replicas = 'by_experts'", "leave one"],
        ("replicas", "by_tokens"): ["sere.replicas = 'by_tokens'", "'by_experts'", "restart"],
        ("similarity", "f"): ["sere.similarity = 'f'", "a running engine keeps its file"],
    }.items():
        with pytest.raises(PolicyError) as caught:
            state.set_policy({"rule": "none", **dict([keys])})
        has_words(str(caught.value), *words)
    with pytest.raises(PolicyError) as caught:
        Group(**ALONE).states[0].set_policy({"rule": "none"})
    has_words(str(caught.value), "sere.rule = 'none'", "changes nothing", "replicas = 'by_experts'")
