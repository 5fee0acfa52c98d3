"""Learned masks in the state of a CPU engine: what steps take, counters, refusals, KV words."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from sere_ray.engine.cpu.state import CpuState
from sere_ray.engine.cpu.union import UnionOfRanks
from sere_ray.masks.compose import after_masks
from sere_ray.masks.slots import kept_slots
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, PADDING, REROUTABLE
from sere_ray.rules.common import named_by
from sere_ray.rules.gate import PLAIN, scores_of
from sere_ray.util.ports import free_port
from tests.engine.ranks import RANKS, gloo_group, run_ranks
from tests.engine.test_cpu_union import (
    EXPERTS,
    LAYERS,
    MARGIN,
    SPARE,
    TOP_K,
    make_artifact,
    make_matrices,
    make_statistics,
)
from tests.masks.made import make_masks

H = 10
SERE = {"select_top_k": 1, "min_primary_experts": 2}
NONE = {"rule": "none"}
FILES = {"similarity": "a.safetensors", "masks": "m.safetensors"}
RULES = [
    NONE,
    SERE,
    {"select_top_k": 2, "threshold": 0.6},
    {"select_top_k": TOP_K},
    MARGIN,
    {**MARGIN, "min_primary_experts": 0, "by_rows": [{"up_to": 4, "tau": 0.2}]},
    {**MARGIN, "tau": 0.3, "balance_ranks": True},
    SPARE,
    {**SPARE, "protect": False, "lead": 0.3, "limit": 0.5},
]


def masks(seed=0, **changes):
    shapes = dict.fromkeys(range(LAYERS), (EXPERTS, H))
    prints = dict.fromkeys(shapes, "0" * 32)
    return make_masks(shapes, prints, **{"top_k": TOP_K, "seed": seed, **changes})


def make_state(keys, *, with_artifact=True, **changes):
    policy = Policy.parse({**FILES, "level": 1, **keys})
    artifact = make_artifact() if with_artifact else None
    return CpuState(policy, artifact, TOP_K, 64, masks=masks(**changes))


def rows_of(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, H, generator=generator)
    logits = 2 * torch.randn(rows, EXPERTS, generator=generator)
    weights, ids = logits.softmax(-1).topk(TOP_K)
    return ids.int(), weights, logits, hidden


def read(ids, weights, kinds):
    """Experts that rows compute something with."""
    return named_by(torch.where(weights != 0, ids, -1), kinds != PADDING, EXPERTS)


@pytest.mark.parametrize(("skips", "keep_first"), [(True, True), (False, False)])
@pytest.mark.parametrize("keys", RULES, ids=lambda keys: ",".join(map(str, keys)))
def test_steps_take_what_the_evaluator_takes(keys, skips, keep_first):
    """``==`` with the form that measurements run, on steps of every kind of row."""
    state, bare = make_state(keys, keep_first=keep_first), None
    if keys != NONE:
        bare = CpuState(Policy.parse({**keys, "similarity": "a"}), make_artifact(), TOP_K, 64)
    owner = torch.arange(EXPERTS) % 2 if skips else None
    if skips:
        for of in filter(None, (state, bare)):
            of.owner = dict.fromkeys(range(LAYERS), owner)
    pace, masked, counted = np.random.default_rng(0), np.zeros(LAYERS, dtype=np.int64), []
    reads = np.zeros((2, LAYERS), dtype=np.int64)
    for step in range(24):
        level = step % 3
        state.set_policy({**FILES, **keys, "level": level})
        rows = int(pace.integers(1, 9))
        kinds = pace.choice([REROUTABLE] * 4 + [EXACT, PADDING], size=rows).astype(np.int8)
        kinds[0] = REROUTABLE
        of_rows, knobs_of = torch.from_numpy(kinds), state.bound.for_rows(state_rows(kinds))
        with state.step(kinds):
            for layer in range(LAYERS):
                ids, weights, logits, hidden = rows_of(100 * step + layer, rows)
                found = state.choose(layer, ids, weights, logits, hidden)
                if level == 0:
                    check_bare(bare, kinds, layer, (ids, weights, logits), found)
                    continue
                mask = state.masks.level(level, path="m")[layer]
                kept = kept_slots(hidden, ids, weights, of_rows, mask)
                knobs = knobs_of.of_layer(
                    layer, EXPERTS, make_matrices()[layer], owner, make_statistics(layer)
                )
                scores = scores_of(logits, PLAIN)
                rule = keys.get("rule", "sere")
                wanted = after_masks(rule, kept, ids, weights, scores, of_rows, knobs)
                assert found[0].dtype == ids.dtype
                check(found, wanted, (ids, weights), of_rows, skips=skips)
                masked[layer] += int((~kept).sum())
                reads[0, layer] += int(read(ids, weights, of_rows).sum())
                reads[1, layer] += int(read(*wanted, of_rows).sum())
        counted += [] if level == 0 else [state.read_counters(reset=False)]
        state.reset_counters()
    assert totals_of("slots_masked", counted).tolist() == masked.tolist()
    assert masked.min() > 20
    assert totals_of("experts_before", counted).tolist() == reads[0].tolist()
    after = totals_of("experts_after", counted)
    if skips or keep_first:
        assert after.tolist() == reads[1].tolist()
    else:  # a step that masks leave without experts still reads one
        assert (after >= reads[1]).all()


def check_bare(bare, kinds, layer, gate, found):
    """At level 0 steps are as without masks."""
    wanted = gate[:2]
    if bare is not None:
        with bare.step(kinds):
            wanted = bare.choose(layer, *gate)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def totals_of(name, counted):
    """``[layers]``: of both kinds of step."""
    return np.sum([of[kind][name] for of in counted for kind in ("decode_only", "mixed")], axis=0)


def state_rows(kinds):
    return int((kinds == REROUTABLE).sum())


def check(found, wanted, gate, kinds, *, skips):
    """Found is wanted, with dropped slots named where the kernel must have a name."""
    (ids, weights), kept = found, wanted[0] >= 0
    assert torch.equal(ids[kept], wanted[0][kept])
    assert torch.equal(weights, wanted[1])
    still = kinds != REROUTABLE
    assert torch.equal(ids[still], gate[0][still])
    assert torch.equal(weights[still], gate[1][still])
    if not skips:
        read_anyway = set(wanted[0][kept].tolist()) or {0}
        assert set(ids.flatten().tolist()) <= read_anyway


@pytest.mark.parametrize("keys", [NONE, MARGIN], ids=lambda keys: keys["rule"])
def test_masks_do_without_an_artifact(keys):
    state = make_state({**keys, "similarity": None}, with_artifact=False)
    ids, weights, logits, hidden = rows_of(0, 5)
    with state.step(np.ones(5, dtype=np.int8)):
        found = state.choose(0, ids, weights, logits, hidden)
    mask = state.masks.level(1, path="m")[0]
    kinds = torch.ones(5, dtype=torch.int8)
    kept = kept_slots(hidden, ids, weights, kinds, mask)
    knobs = state.bound.of_layer(0, EXPERTS, None)
    wanted = after_masks(
        state.bound.rule, kept, ids, weights, scores_of(logits, PLAIN), kinds, knobs
    )
    check(found, wanted, (ids, weights), kinds, skips=False)


@pytest.mark.parametrize("mode", ["off", "observe"])
def test_other_modes_leave_rows_alone(mode):
    state = make_state({**NONE, "mode": mode})
    ids, weights, logits, hidden = rows_of(0, 5)
    with state.step(np.ones(5, dtype=np.int8)):
        found = state.choose(0, ids, weights, logits, hidden)
    assert torch.equal(found[0], ids)
    assert torch.equal(found[1], weights)
    counted = state.read_counters(reset=False)["decode_only"]
    assert (counted["slots_masked"][0] > 0) == (mode == "observe")
    assert (counted["experts_after"][0] < counted["experts_before"][0]) == (mode == "observe")


def test_drafts_count_as_far_as_they_are_likely():
    """As the rule does without masks, where nothing is masked; and they change what is kept."""
    keys = {**MARGIN, "min_primary_experts": 0, "tau": 0.05}
    state, bare = (
        make_state(keys),
        CpuState(Policy.parse({**keys, "similarity": "a"}), make_artifact(), TOP_K, 64),
    )
    state.of_level = {layer: zero(mask) for layer, mask in state.of_level.items()}
    drafts, differs = np.array([0, 1, 2, 3, 0, 1, 2, 3], dtype=np.int8), 0
    for seed in range(10):
        of_rows, found = rows_of(seed, 8), []
        for of, weights in ((state, (32, 1, 1, 1)), (bare, (32, 1, 1, 1)), (bare, (32,) * 4)):
            of.draft_weights = weights
            with of.step(np.ones(8, dtype=np.int8), drafts):
                found.append(of.choose(0, *of_rows))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
        differs += not torch.equal(found[1][0], found[2][0])
    assert differs > 0


def zero(mask):
    return replace(mask, weight=torch.zeros_like(mask.weight))


# --- several ranks --------------------------------------------------------------------------------


RANK_POLICIES = [
    {**keys, "union": union, "level": level}
    for keys in (NONE, SERE, MARGIN, SPARE)
    for union in ("global", "local")
    for level in (1, 2)
]
OWNER = torch.arange(EXPERTS) * RANKS // EXPERTS


def ranks_under_load(rank, port):
    """Passes of uneven ranks, some of them idle, under policies that change.

    Returns:
        Per pass and layer: number of the policy, experts before and after as counted, and ids,
        weights, logits, hidden states, kinds, new ids, new weights.
    """
    union = UnionOfRanks(gloo_group(rank, port), compares=True)
    policy = Policy.parse({**FILES, **NONE, "level": 0})
    state = CpuState(policy, make_artifact(), TOP_K, 64, masks=masks(), union=union)
    state.owner = dict.fromkeys(range(LAYERS), OWNER)
    pace, calls = np.random.default_rng(rank), []
    for number in range(4 * len(RANK_POLICIES)):
        policy = number % len(RANK_POLICIES)
        state.set_policy({**FILES, **RANK_POLICIES[policy]})
        count = int(pace.integers(0, 6))
        kinds, of_pass = pace.integers(REROUTABLE, EXACT + 1, size=count).astype(np.int8), []
        with state.step(kinds):
            for layer in range(LAYERS):
                of_rows = rows_of(1000 * rank + 10 * number + layer, max(count, 1))
                new = state.choose(layer, *of_rows)
                kind = state.row_kind[: len(of_rows[0])].clone()
                of_pass.append([t.tolist() for t in (*of_rows, kind, *new)])
        counters = state.counters.sum(axis=0)[:, :2].tolist()
        state.counters[:] = 0
        calls += [(policy, *call) for call in zip(counters, of_pass, strict=True)]
    return calls


def test_ranks_take_masks_first_and_then_the_union_of_all():
    """Ids of each rank are those of masks and rule on the rows of both; so are the counts."""
    several, differs = masks(), 0
    for number, calls in enumerate(zip(*run_ranks(ranks_under_load, free_port()), strict=True)):
        keys, layer = RANK_POLICIES[calls[0][0]], number % LAYERS
        bound = Policy.parse({**FILES, **keys}).for_model(top_k=TOP_K)
        for group in [calls] if bound.union == "global" else [[call] for call in calls]:
            fields = [list(chain(*of)) for of in zip(*(call[2] for call in group), strict=True)]
            ids, weights, logits, hidden, kinds, new_ids, new_weights = map(torch.tensor, fields)
            kinds = kinds.to(torch.int8)
            if REROUTABLE not in kinds:
                assert torch.equal(new_ids, ids)
                continue
            mask = several.level(bound.level, path="m")[layer]
            kept = kept_slots(hidden, ids, weights, kinds, mask)
            knobs = bound.of_layer(
                layer, EXPERTS, make_matrices()[layer], OWNER, make_statistics(layer)
            )
            scores = scores_of(logits, PLAIN)
            wanted = after_masks(bound.rule, kept, ids, weights, scores, kinds, knobs)
            assert torch.equal(new_ids, wanted[0])
            assert torch.equal(new_weights, wanted[1])
            pairs = [(ids, weights), wanted]
            assert group[0][1] == [int(read(*pair, kinds).sum()) for pair in pairs]
            differs += not torch.equal(new_ids, torch.where(kept, ids, -1))
    assert differs > 10
