"""What data-parallel ranks of a CPU engine exchange, in two gloo processes without an engine."""

import json
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.engine.cpu.expert_parallel import (
    _drop_foreign_slots,
    gather_rows,
    gather_together,
    reduce_rows,
)
from sere_ray.engine.cpu.state import CpuState
from sere_ray.engine.cpu.union import UnionOfRanks
from sere_ray.engine.placement import expert_owner
from sere_ray.policy.policy import Policy
from sere_ray.policy.startup import Startup
from sere_ray.rules import EXACT, PADDING, REROUTABLE, RULES, Layer, name_dropped, reroute
from sere_ray.rules.gate import PLAIN, scores_of
from sere_ray.util.errors import ArtifactError, PolicyError, SereError
from sere_ray.util.ports import free_port
from tests.engine.ranks import RANKS, gloo_group, run_ranks

EXPERTS, TOP_K, LAYERS = 12, 3, 2
SWITCHES, PASSES = 1000, 800
ARTIFACTS = 3


# --- rows ----------------------------------------------------------------------------------------


def exchange_rows(rank, port, sizes, dtype):
    """Gather every rank's rows, then reduce their multiples; checked in the process itself."""
    group = gloo_group(rank, port)
    for of_ranks in sizes:
        rows = torch.arange(of_ranks[rank] * 5).view(-1, 5).to(dtype) + 100 * rank
        gathered = gather_rows(rows, of_ranks, group)
        expected = [
            torch.arange(n * 5).view(-1, 5).to(dtype) + 100 * r for r, n in enumerate(of_ranks)
        ]
        assert torch.equal(gathered, torch.cat(expected))
        ids = torch.arange(of_ranks[rank] * 2, dtype=torch.int32).view(-1, 2, 1) + rank
        together = gather_together([rows, ids], of_ranks, group)
        for found, apart in zip(
            together, (gathered, gather_rows(ids, of_ranks, group)), strict=True
        ):
            assert found.dtype == apart.dtype
            assert torch.equal(found, apart)
        reduced = reduce_rows(gathered * (rank + 1), of_ranks, group)
        assert reduced.dtype == dtype
        parts = [(rows * (r + 1)).float() for r in range(RANKS)]
        assert torch.equal(reduced, torch.stack(parts).sum(dim=0).to(dtype))
    even = torch.full((2, 3), rank + 1).to(dtype)
    assert gather_rows(even, None, group)[:, 0].tolist() == [1, 1, 2, 2]
    assert reduce_rows(torch.cat([even, even]), None, group).tolist() == [[3.0] * 3] * 2
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_uneven_ranks(dtype):
    assert run_ranks(exchange_rows, free_port(), [(3, 3), (1, 4), (0, 2), (5, 0), (0, 0)], dtype)


@pytest.mark.parametrize(
    ("ranks", "placement", "owner"),
    [
        (3, "linear", [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]),
        (3, "round_robin", [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]),
        (1, "linear", [0] * 10),
    ],
)
def test_owner_of_each_expert(ranks, placement, owner):
    """vLLM gives experts that are left over to the first ranks."""
    manager = SimpleNamespace(global_num_experts=10, ep_size=ranks, placement_strategy=placement)
    runner = SimpleNamespace(routed_experts=SimpleNamespace(expert_map_manager=manager))
    assert expert_owner(runner).tolist() == owner


def test_foreign_slots_never_reach_the_kernel():
    """Against a dense sum over the experts that live here."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(4, generator=generator)  # expert e multiplies its input by scale[e]
    seen = []

    def kernel(experts, *, output, hidden_states, topk_weights, topk_ids, expert_map):
        assert expert_map is None
        assert topk_ids.dtype == torch.int32
        seen.append(topk_ids.numel())
        factor = (topk_weights * scale[topk_ids.long()]).sum(dim=1, keepdim=True)
        output.copy_(hidden_states * factor)

    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
    expert_map[torch.tensor([7, 2, 11, 4])] = torch.arange(4, dtype=torch.int32)
    for rows in (0, 1, 6, 40):
        ids = torch.randint(-1, EXPERTS, (rows, TOP_K), generator=generator, dtype=torch.int32)
        ids[: rows // 3] = 0  # rows without a slot here
        weights = torch.rand((rows, TOP_K), generator=generator)
        x = torch.randn((rows, 8), generator=generator)
        output = torch.full((rows, 8), torch.nan)
        seen.clear()
        _drop_foreign_slots(
            kernel,
            None,
            output=output,
            hidden_states=x,
            topk_weights=weights,
            topk_ids=ids,
            expert_map=expert_map,
        )
        mine = (ids >= 0) & (expert_map[ids.clamp(min=0).long()] >= 0)
        local = expert_map[ids.clamp(min=0).long()].clamp(min=0).long()
        factor = torch.where(mine, weights * scale[local], 0.0).sum(dim=1, keepdim=True)
        assert torch.allclose(output, x * factor, atol=1e-6)
        assert sum(seen) == int(mine.sum())


# --- policies ------------------------------------------------------------------------------------


def make_matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.rand(EXPERTS, EXPERTS, generator=generator).fill_diagonal_(1.0)
        for layer in range(LAYERS)
    }


def make_statistics(layer, seed=0):
    """Of half of the pairs one can stand in."""
    generator = torch.Generator().manual_seed(10 * seed + layer)
    loss = 2 * torch.rand(EXPERTS, EXPERTS, generator=generator)
    scale = 2 * torch.rand(EXPERTS, EXPERTS, generator=generator) - 0.5
    return {"directed_loss": loss.clamp(max=1).fill_diagonal_(1.0), "directed_scale": scale}


def make_artifact(seed=0, fingerprint="0"):
    layers = make_matrices(seed)
    statistics = {layer: make_statistics(layer, seed) for layer in layers}
    metadata = ArtifactMetadata(
        model_id="m",
        architecture="A",
        num_experts=EXPERTS,
        top_k=TOP_K,
        router_fingerprint=dict.fromkeys(layers, fingerprint * 32),
        metric="random",
        date="2026-11-22",
    )
    return SimilarityArtifact(layers, metadata, statistics)


def artifact_bytes(folder, **kwargs):
    path = folder / "new.safetensors"
    make_artifact(**kwargs).save(path)
    return path.read_bytes()


def make_state(group, similarity_seed=0, **startup):
    policy = Policy.parse({"similarity": "a.safetensors", "select_top_k": 1})
    artifact, startup = make_artifact(similarity_seed), Startup(**startup)
    union = UnionOfRanks(group, compares=startup.check_ranks)
    return CpuState(policy, artifact, TOP_K, 64, startup=startup, union=union)


def switching_policies():
    rng = np.random.default_rng(0)
    return [
        {
            "similarity": "a.safetensors",
            "select_top_k": int(rng.integers(1, TOP_K + 1)),
            "threshold": [None, 0.5, 0.9][rng.integers(3)],
            "min_primary_experts": int(rng.integers(0, 6)),
            "mode": ["on", "on", "on", "observe", "off"][rng.integers(5)],
            "union": ["global", "global", "global", "local"][rng.integers(4)],
            "by_rows": [None, [{"up_to": int(rng.integers(1, 6)), "select_top_k": 2}]][
                rng.integers(2)
            ],
        }
        for _ in range(SWITCHES)
    ]


def switch_under_load(rank, port, folder):
    """1,000 switches, every fifth with another artifact, told to each rank between passes of its
    own choice.

    Returns:
        Per pass and layer: the policy that ran, ids, weights, kinds, new ids.
    """
    state = make_state(gloo_group(rank, port))
    (folder / str(rank)).mkdir()
    contents = [artifact_bytes(folder / str(rank), seed=seed) for seed in range(ARTIFACTS)]
    seeds = {make_matrices(seed)[0][0, 1].item(): seed for seed in range(ARTIFACTS)}
    policies, told, calls = switching_policies(), 0, []
    pace = np.random.default_rng(rank + 1)
    generator = torch.Generator().manual_seed(rank)
    for number in range(PASSES):
        left = SWITCHES - told
        for _ in range(left if number == PASSES - 5 else min(int(pace.integers(0, 4)), left)):
            artifact = contents[told % ARTIFACTS] if told % 5 == 0 else None
            state.set_policy(policies[told], artifact)
            told += 1
        count = int(pace.integers(0, 6))
        kinds = pace.integers(PADDING, EXACT + 1, size=count).astype(np.int8)
        with state.step(kinds):
            for layer in range(LAYERS):
                scores = torch.rand((max(count, 1), EXPERTS), generator=generator)  # 0: a dummy row
                weights, ids = scores.topk(TOP_K)
                new_ids, _ = state.choose(layer, ids.to(torch.int32), weights, weights)
                kind = state.row_kind[: len(ids)].clone()
                seed = seeds[state.similarity[0][0, 1].item()]
                calls.append((state.bound, seed, ids, weights, kind, new_ids.long()))
    assert list(state.versions.told) == [SWITCHES]
    assert state.versions.told[SWITCHES] is state.running
    return [
        ({**bound.model_dump(), "seed": seed}, *(t.tolist() for t in call))
        for bound, seed, *call in calls
    ]


def rule_of(policy, layer, ids, weights, kinds):
    if policy["mode"] != "on":
        return ids
    matrix = make_matrices(policy["seed"])[layer]
    rows = kinds.count(REROUTABLE)
    policy = next((bound for up_to, bound in policy["by_rows"] if rows <= up_to), policy)
    return reroute(
        torch.tensor(ids),
        torch.tensor(weights),
        matrix,
        row_kind=torch.tensor(kinds, dtype=torch.int8),
        select_top_k=policy["select_top_k"],
        threshold=policy["threshold"],
        min_primary_experts=policy["min_primary_experts"],
    ).tolist()


def test_a_thousand_switches_under_load(tmp_path):
    """At every pass both ranks run the same policy and matrices, and give their rule on the rows
    of both."""
    passes = run_ranks(switch_under_load, free_port(), tmp_path)
    policies = set()
    for number, (one, two) in enumerate(zip(*passes, strict=True)):
        policy, layer = one[0], number % LAYERS
        assert two[0] == policy
        policies.add(json.dumps(policy))
        if policy["union"] == "local":
            for _, ids, weights, kinds, new_ids in (one, two):
                assert new_ids == rule_of(policy, layer, ids, weights, kinds)
        else:
            ids, weights, kinds, new_ids = (a + b for a, b in zip(one[1:], two[1:], strict=True))
            assert new_ids == rule_of(policy, layer, ids, weights, kinds)
    assert len(policies) > 50
    assert {json.loads(policy)["seed"] for policy in policies} == set(range(ARTIFACTS))


MARGIN = {"rule": "margin", "tau": 0.02, "runners_up": 4}
SPARE = {"rule": "spare", "tau": 0.1, "runners_up": 4, "min_primary_experts": 1}
DEMAND_POLICIES = [
    MARGIN,
    {**MARGIN, "min_primary_experts": 0, "beta": 1.0},
    {**MARGIN, "tau": [1.0, 0.005]},
    {**MARGIN, "union": "local"},
    {**MARGIN, "mode": "observe"},
    {**MARGIN, "balance_ranks": True, "by_rows": [{"up_to": 6, "tau": 0.1}]},
    SPARE,
    {**SPARE, "lead": 0.3, "limit": 0.5, "protect": False},
    {**SPARE, "tau": [1.0, 0.05], "min_primary_experts": None},
    {**SPARE, "union": "local"},
    {**SPARE, "mode": "observe"},
    {**SPARE, "protect": False, "by_rows": [{"up_to": 6, "tau": 0.4}]},
    {"select_top_k": 1},
]
OWNER = torch.arange(EXPERTS) * RANKS // EXPERTS


def demand_under_load(rank, port):
    """Passes of uneven ranks, some of them idle, under rules and unions that change.

    Returns:
        Per pass and layer: number of the policy, what was counted (experts before, experts after,
        slots), ids, weights, logits, kinds, new ids, new weights.
    """
    state = make_state(gloo_group(rank, port), check_ranks=True)
    state.owner = dict.fromkeys(range(LAYERS), OWNER)
    pace, calls = np.random.default_rng(rank), []
    generator = torch.Generator().manual_seed(rank)
    for number in range(130):
        policy = number % len(DEMAND_POLICIES)
        state.set_policy({"similarity": "a.safetensors", **DEMAND_POLICIES[policy]})
        count = int(pace.integers(0, 7))
        kinds, of_pass = pace.integers(REROUTABLE, EXACT + 1, size=count).astype(np.int8), []
        with state.step(kinds):
            for layer in range(LAYERS):
                logits = 2 * torch.randn((max(count, 1), EXPERTS), generator=generator)
                weights, ids = logits.softmax(-1).topk(TOP_K)
                new = state.choose(layer, ids.int(), weights, logits)
                kind = state.row_kind[: len(ids)].clone()
                of_pass.append([t.tolist() for t in (ids, weights, logits, kind, *new)])
        counters = state.counters.sum(axis=0)[:, :3].tolist()
        state.counters[:] = 0
        calls += [(policy, *call) for call in zip(counters, of_pass, strict=True)]
    return calls


def test_rules_of_demand_keep_one_set_of_experts_on_all_ranks():
    """Ids of each rank are those of the rule on the rows of both; so are the experts counted."""
    changed = dict.fromkeys(("margin", "spare"), 0)
    for number, calls in enumerate(zip(*run_ranks(demand_under_load, free_port()), strict=True)):
        keys = DEMAND_POLICIES[calls[0][0]]
        if (rule := keys.get("rule")) is None:
            continue
        policy = Policy.parse({"similarity": "a.safetensors", **keys})
        bound = policy.for_model(top_k=TOP_K)
        for group in [calls] if policy.union == "global" else [[call] for call in calls]:
            fields = [list(chain(*of)) for of in zip(*(call[2] for call in group), strict=True)]
            ids, weights, logits, kinds, new_ids, new_weights = map(torch.tensor, fields)
            scores = scores_of(logits, PLAIN)
            of_step = bound.for_rows(int((kinds == REROUTABLE).sum()))
            layer = number % LAYERS
            statistics = make_statistics(layer)
            knobs = of_step.of_layer(layer, EXPERTS, None, OWNER, statistics)
            wanted = RULES[rule].apply(ids, weights, scores, kinds.to(torch.int8), knobs)
            exactly = policy.mode == "observe"
            assert torch.equal(new_ids, ids if exactly else wanted[0])
            assert torch.equal(new_weights, weights if exactly else wanted[1])
            changed[rule] += int((new_ids != ids).sum())
            decodes, rows = bool((kinds == REROUTABLE).any()), kinds != PADDING
            read = [len(set(of[rows].flatten().tolist()) - {-1}) for of in (ids, wanted[0])]
            for _, counts, _ in group:
                assert counts[:2] == (read if decodes else [0, 0])
            stayed = (wanted[0][:, :, None] == ids[:, None, :]).any(dim=2)
            assert sum(counts[2] for _, counts, _ in group) == int((~stayed[rows]).sum())
    assert min(changed.values()) > 100


def disagree(rank, port, what):
    """Two ranks that differ raise, both, and in the pass in which that shows."""
    group = gloo_group(rank, port)
    state = make_state(group, similarity_seed=rank if what == "artifact" else 0)
    ids, weights = torch.zeros((1, TOP_K), dtype=torch.int32), torch.ones(1, TOP_K)

    def run_pass():
        with state.step(np.ones(1, dtype=np.int8)):
            state.choose(0, ids, weights, weights)

    policy = state.policy.model_dump()
    if what == "policy":
        run_pass()
        state.set_policy({**policy, "select_top_k": rank + 1})
    if what == "order":
        for select_top_k in (2, 3) if rank else (3, 2):
            state.set_policy({**policy, "select_top_k": select_top_k})
        state.set_policy(policy)
    try:
        run_pass()
    except PolicyError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("what", ["artifact", "policy", "order"])
def test_ranks_that_differ_say_so(has_words, what):
    for messages in run_ranks(disagree, free_port(), what):
        assert len(messages) == 1, "the rank raised nothing"
        has_words(messages[0], "differ in their policies", "similarity artifact", "same 'sere' key")


def test_a_rule_is_told_which_rank_holds_an_expert():
    keys = {"tau": 0.05, "min_primary_experts": 0, "balance_ranks": True}
    policy = Policy.parse({"similarity": "a.safetensors", "rule": "margin", **keys})
    state = CpuState(policy, make_artifact(), TOP_K, 64)
    logits = torch.randn(5, EXPERTS, generator=torch.manual_seed(0))
    weights, ids = logits.softmax(-1).topk(TOP_K)
    kinds, found = torch.full((5,), REROUTABLE, dtype=torch.int8), []
    for owner in (None, torch.arange(EXPERTS) // 4):
        if owner is not None:
            state.owner[0] = owner
        layer = Layer(EXPERTS, **keys, owner=owner)
        expected = RULES["margin"].apply(ids, weights, scores_of(logits, PLAIN), kinds, layer)[0]
        with state.step(kinds.numpy()):
            new_ids, _ = state.choose(0, ids, weights, logits)
        assert torch.equal(new_ids, name_dropped(expected, ids))
        found.append(new_ids)
    assert not torch.equal(*found)


def damage(rank, port):
    """A torn matrix on one rank: what the ranks say, with the check and without."""
    group, messages = gloo_group(rank, port), []
    for check_ranks in (True, False):
        state = make_state(group, check_ranks=check_ranks)
        weights, ids = torch.rand((5, EXPERTS), generator=torch.manual_seed(rank)).topk(TOP_K)
        for layer in (0, 1):
            if rank and layer:
                state.similarity[layer] = state.similarity[layer].flip(1).contiguous()
            try:
                with state.step(np.ones(5, dtype=np.int8)):
                    state.choose(layer, ids.int(), weights, weights)
            except SereError as error:
                messages.append(str(error))
    return messages


def test_ranks_that_are_told_to_compare_notice_a_torn_matrix(has_words):
    for messages in run_ranks(damage, free_port()):
        assert len(messages) == 1, "with the check, in the second layer"
        has_words(messages[0], "sere.check_ranks", "layer 1", "restart")


def test_a_wrong_policy_or_artifact_leaves_the_rank_as_it_was(tmp_path, has_words):
    state = make_state(None)
    policy, artifact, similarity = state.policy.model_dump(), state.artifact, state.similarity
    with pytest.raises(PolicyError):
        state.set_policy({**policy, "select_top_k": 9}, artifact_bytes(tmp_path, seed=1))
    with pytest.raises(ArtifactError) as caught:
        state.set_policy(policy, artifact_bytes(tmp_path, seed=1, fingerprint="1"))
    has_words(str(caught.value), "a.safetensors", "router fingerprint of layer 0", "1111", "0000")
    with pytest.raises(ArtifactError):
        state.set_policy(policy, b"not an artifact")
    with pytest.raises(PolicyError):
        state.set_policy({**policy, "similarity": "b.safetensors"})
    assert (state.versions.newest, len(state.versions.told)) == (0, 1)
    assert state.artifact is artifact
    assert state.similarity is similarity
