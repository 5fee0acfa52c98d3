"""Masks first, then a rule: held to the oracle of the rules, whose rows may have any length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_ray.masks.compose import after_masks
from sere_ray.masks.slots import LayerMask, kept_slots
from sere_ray.rules import EXACT, PADDING, REROUTABLE, RULES, Layer
from sere_ray.rules.registry import RULES_AFTER_MASKS
from sere_ray.util.errors import UnsupportedError
from tests.rules import rules_oracle
from tests.rules.test_rules import FULL, E, K, draw, kinds_of, layer, read, statistics

H = 6


def drawn(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, K, generator=generator) < 0.6, *draw(rows, seed)


def test_slots_by_hand():
    """Expert 2 asks for x0 > 0. Row 0 has it, row 1 has not; row 2 is exact, row 3 has a hole."""
    weight = torch.zeros(E, H)
    weight[2, 0], weight[5] = 1.0, -1.0
    hidden = torch.tensor([1.0, -1.0, -1.0, 1.0])[:, None].expand(4, H)
    ids = torch.tensor([[2, 5], [2, 5], [2, 5], [5, -1]])
    weights = torch.tensor([[0.4, 0.6]] * 4)
    kinds = kinds_of(REROUTABLE, REROUTABLE, EXACT, REROUTABLE)
    kept = kept_slots(hidden, ids, weights, kinds, LayerMask(weight, keep_first=False))
    assert kept.tolist() == [[True, False], [False, True], [True, True], [True, True]]
    kept = kept_slots(hidden, ids, weights, kinds, LayerMask(weight, keep_first=True))
    assert kept.tolist() == [[True, True], [False, True], [True, True], [True, True]]
    nothing = LayerMask(torch.zeros(E, H), keep_first=False)
    assert kept_slots(hidden, ids, weights, kinds, nothing).all(), "zero keeps everything"


@pytest.mark.parametrize("rule", ["margin", "spare"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_row_is_as_if_its_gate_had_chosen_what_is_left(rule, data):
    rows = data.draw(st.integers(1, 7))
    kept, ids, weights, scores = drawn(rows, data.draw(st.integers(0, 10**6)))
    kinds = [data.draw(st.sampled_from([REROUTABLE] * 4 + [EXACT, PADDING])) for _ in range(rows)]
    kept = kept | (kinds_of(*kinds) != REROUTABLE)[:, None]
    of_layer = Layer(
        E,
        tau=data.draw(st.sampled_from([0.0, 0.001, 0.01, 0.05])),
        min_primary_experts=data.draw(st.integers(0, K)),
        runners_up=data.draw(st.integers(1, 6)),
        statistics=statistics(data.draw(st.integers(0, 99)), data.draw(st.booleans())),
    )
    found = after_masks(rule, kept, ids, weights, scores, kinds_of(*kinds), of_layer)

    masked = scores.clone().scatter_(1, ids, torch.where(kept, scores.gather(1, ids), 0.0))
    left = [row.any().item() for row in kept]
    ragged = [
        [(e, w) for e, w, k in zip(*of_row, strict=True) if k]
        for of_row in zip(ids.tolist(), weights.tolist(), kept.tolist(), strict=True)
    ]
    expected = iter(
        rules_oracle.apply(
            rule,
            [[e for e, _ in row] for row in ragged if row],
            [[w for _, w in row] for row in ragged if row],
            [p for p, any_left in zip(masked.tolist(), left, strict=True) if any_left],
            [kind for kind, any_left in zip(kinds, left, strict=True) if any_left],
            of_layer,
        )
    )
    for row in range(rows):
        wanted = zip(*next(expected), strict=True) if left[row] else ()
        wanted = {e: w for e, w in wanted if w != 0}
        got = dict(zip(found[0][row].tolist(), found[1][row].tolist(), strict=True))
        assert {e: w for e, w in got.items() if w != 0} == pytest.approx(wanted, abs=1e-6)
        assert got.get(-1, 0.0) == 0.0


@pytest.mark.parametrize("rule", RULES_AFTER_MASKS)
def test_without_masked_slots_it_is_the_rule(rule):
    _, ids, weights, scores = drawn(6, 3)
    kinds = kinds_of(1, 1, 2, 1, 0, 1)
    everything = torch.ones_like(ids, dtype=torch.bool)
    found = after_masks(rule, everything, ids, weights, scores, kinds, layer(rule))
    expected = RULES[rule].apply(ids, weights, scores, kinds, layer(rule))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("rule", RULES_AFTER_MASKS)
def test_a_rule_that_changes_nothing_leaves_masks_alone(rule):
    kept, ids, weights, scores = drawn(6, 4)
    kept[2] = False
    found = after_masks(
        rule, kept, ids, weights, scores, kinds_of(*[1] * 6), layer(rule, **FULL[rule])
    )
    assert torch.equal(found[0], torch.where(kept, ids, -1))
    assert torch.equal(found[1], torch.where(kept, weights, 0.0))


@pytest.mark.parametrize("rule", RULES_AFTER_MASKS)
def test_no_row_gains_experts_and_steps_are_apart(rule):
    kept, ids, weights, scores = (
        torch.stack(parts) for parts in zip(*(drawn(5, seed) for seed in range(4)), strict=True)
    )
    kinds = torch.full((4, 5), REROUTABLE, dtype=torch.int8)
    new_ids, new_weights = after_masks(rule, kept, ids, weights, scores, kinds, layer(rule))
    assert ((new_weights != 0).sum(-1) <= kept.sum(-1).clamp(min=0)).all()
    for step in range(4):
        alone = after_masks(
            *(rule, kept[step], ids[step], weights[step], scores[step], kinds[step], layer(rule))
        )
        assert torch.equal(alone[0], new_ids[step])
        assert torch.equal(alone[1], new_weights[step])
        assert read(*alone) <= read(ids[step], torch.where(kept[step], weights[step], 0.0))


@pytest.mark.parametrize("rule", RULES_AFTER_MASKS)
def test_no_rows_are_no_rows(rule):
    ids, weights = torch.zeros((0, K), dtype=torch.int32), torch.zeros(0, K)
    kept, kinds = torch.ones((0, K), dtype=torch.bool), torch.zeros(0, dtype=torch.int8)
    found = after_masks(rule, kept, ids, weights, torch.zeros(0, E), kinds, layer(rule))
    assert [part.shape for part in found] == [(0, K)] * 2


def test_a_masked_expert_does_not_fill_the_floor():
    """A lone row of which two slots are left reads two, though the floor is K."""
    _, ids, weights, scores = drawn(1, 5)
    kept = torch.tensor([[False, True, True] + [False] * (K - 3)])
    of_layer = layer("margin", tau=1.0, min_primary_experts=K)
    new_ids, _ = after_masks("margin", kept, ids, weights, scores, kinds_of(1), of_layer)
    assert new_ids.tolist() == torch.where(kept, ids, -1).tolist()


def test_peers_are_refused(has_words):
    _, ids, weights, scores = drawn(2, 6)
    with pytest.raises(UnsupportedError) as error:
        after_masks("lynx", ids >= 0, ids, weights, scores, kinds_of(1, 1), layer("lynx"))
    has_words(str(error.value), "'lynx'", "none, sere, margin, spare", "leave masks out")
