"""The rule ``margin`` behind gates of every kind: brute force, by hand, what must not matter."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_ray.rules import EXACT, PADDING, REROUTABLE, RULES, Layer
from sere_ray.rules.gate import MOST, NEVER, SCORE_UNIT, Gate, in_units, scores_of
from sere_ray.rules.margin import UNIT, ask, demand
from tests.rules import rules_oracle
from tests.rules.gate_cases import choose, make_gate

MARGIN = RULES["margin"].apply
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")


def kinds_of(rows, kind=REROUTABLE):
    return torch.full((rows,), kind, dtype=torch.int8)


@pytest.mark.parametrize("scoring", SCORINGS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_equals_brute_force(scoring, data):
    rows = data.draw(st.integers(0, 7))
    groups, experts, slots = data.draw(
        st.sampled_from([(1, 12, 3), (4, 12, 3), (3, 12, 5), (2, 8, 8), (4, 16, 4)])
    )
    seed = data.draw(st.integers(0, 10**6))
    spread = data.draw(st.sampled_from([0.0, 0.05, 0.5, 50.0]))
    gate = make_gate(scoring, experts=experts, bias=spread, groups=groups, seed=seed)
    scale = data.draw(st.sampled_from([0.1, 1.5, 60.0]))
    logits = scale * torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))
    top_groups = max(2, groups // 2)
    ids, weights = choose(logits, gate, slots=slots, top_groups=top_groups)
    weights = weights * 2.5 + 1e-9
    kinds = [data.draw(st.sampled_from([REROUTABLE] * 4 + [EXACT, PADDING])) for _ in range(rows)]
    of_layer = Layer(
        experts,
        gate=gate,
        tau=data.draw(st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.3])),
        min_primary_experts=data.draw(st.integers(0, experts)),
        runners_up=data.draw(st.sampled_from([1, 4, 1000])),
        beta=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    scores = scores_of(logits, gate)
    kind = torch.tensor(kinds, dtype=torch.int8)
    new_ids, new_weights = MARGIN(ids, weights, scores, kind, of_layer)
    expected = rules_oracle.apply(
        "margin", ids.tolist(), weights.tolist(), scores.tolist(), kinds, of_layer
    )
    for row, (expected_ids, expected_weights) in enumerate(expected):
        assert new_ids[row].tolist() == expected_ids
        assert new_weights[row].tolist() == pytest.approx(expected_weights, rel=1e-4, abs=1e-6)


def test_by_hand():
    """Bias 0.25 lifts expert 2 over expert 1; a lead counts what the gate ranks by."""
    gate = Gate("sigmoid", torch.tensor([0.0, 0.0, 0.25, 0.0]))
    scores = torch.tensor([[0.5, 0.375, 0.25, 0.125]])
    ids = torch.tensor([[0, 2]])
    assert in_units(scores, ids, gate).ranks.tolist() == [
        [SCORE_UNIT, SCORE_UNIT * 3 // 4, SCORE_UNIT, SCORE_UNIT // 4]
    ]
    layer = Layer(4, gate=gate, runners_up=2)
    # (1 - (3/4 + 1/4) / 2) / (1 + 1/2) = 1/3 for either
    wanted = demand(ids, scores, kinds_of(1), layer)
    assert wanted.tolist() == [UNIT // 9, 0, UNIT // 9, 0]


def test_a_bias_in_common_changes_nothing():
    logits = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))
    for scoring in SCORINGS:
        bias = torch.randint(-8, 8, (16,), generator=torch.Generator().manual_seed(4)) / 64
        found = []
        for shift in (0.0, 2.0):
            gate = Gate(scoring, bias + shift)
            ids, _ = choose(logits, gate, slots=4, top_groups=1)
            scores = scores_of(logits, gate)
            layer = Layer(16, gate=gate, tau=0.01)
            found.append(demand(ids, scores, kinds_of(50), layer))
        assert ((found[0] - found[1]).abs() <= 50).all(), scoring  # a unit for rounding in each row


def test_a_bias_of_zero_is_none():
    logits = torch.randn(40, 16, generator=torch.Generator().manual_seed(5))
    for scoring in SCORINGS:
        ids, weights = choose(logits, Gate(scoring), slots=4, top_groups=1)
        scores, found = scores_of(logits, Gate(scoring)), []
        for bias in (None, torch.zeros(16)):
            layer = Layer(16, gate=Gate(scoring, bias), tau=0.01)
            found.append(ask(ids, weights, scores, kinds_of(40), layer))
        assert torch.equal(*found)


def test_stand_ins_come_from_groups_that_the_row_chose_from():
    gate = make_gate("sigmoid", experts=16, bias=0.1, groups=4)
    logits = torch.randn(6, 16, generator=torch.Generator().manual_seed(6))
    ids, weights = choose(logits, gate, slots=4, top_groups=2)
    layer = Layer(16, gate=gate, tau=0.9)
    new_ids, _ = MARGIN(ids, weights, scores_of(logits, gate), kinds_of(6), layer)
    assert not torch.equal(new_ids, ids)
    for before, after in zip(ids.tolist(), new_ids.tolist(), strict=True):
        assert {e // 4 for e in after if e >= 0} <= {e // 4 for e in before}
    anywhere = dataclasses.replace(layer, gate=dataclasses.replace(gate, group_size=0))
    others, _ = MARGIN(ids, weights, scores_of(logits, gate), kinds_of(6), anywhere)
    assert not torch.equal(others, new_ids)


def test_weights_keep_the_scale_of_the_gate():
    """Renormalised or not, scaled or not: the rule sees the weights it is given."""
    gate = make_gate("sigmoid", experts=16, bias=0.1)
    logits = torch.randn(30, 16, generator=torch.Generator().manual_seed(7))
    ids, weights = choose(logits, gate, slots=4, top_groups=1)
    layer = Layer(16, gate=gate, tau=0.02, beta=1.0)
    scores = scores_of(logits, gate)
    plain = MARGIN(ids, weights, scores, kinds_of(30), layer)
    scaled = MARGIN(ids, weights * 4, scores, kinds_of(30), layer)
    assert not torch.equal(plain[0], ids)
    assert torch.equal(plain[0], scaled[0])
    torch.testing.assert_close(plain[1] * 4, scaled[1])
    torch.testing.assert_close(plain[1].sum(dim=1), weights.sum(dim=1))


def test_the_best_named_expert_of_a_wide_layer():
    """E = 1,024 and K = 32, the most that engines take."""
    gate = make_gate("sqrtsoftplus", experts=1024, bias=0.02)
    logits = torch.randn(3, 1024, generator=torch.Generator().manual_seed(8))
    ids, weights = choose(logits, gate, slots=32, top_groups=1)
    layer = Layer(1024, gate=gate, tau=0.001, runners_up=992)
    scores = scores_of(logits, gate)
    found, _ = MARGIN(ids, weights, scores, kinds_of(3), layer)
    expected = rules_oracle.apply(
        "margin", ids.tolist(), weights.tolist(), scores.tolist(), [REROUTABLE] * 3, layer
    )
    assert found.tolist() == [row for row, _ in expected]
    assert not torch.equal(found, ids)


def test_scores_that_are_all_zero_ask_for_nothing():
    gate = Gate("sigmoid", torch.tensor([0.0, 0.5, 1.0, 0.0]))
    scores = torch.zeros(1, 4)
    ranks = in_units(scores, torch.tensor([[2, 1]]), gate).ranks
    assert ranks.tolist() == [[0, MOST, MOST, 0]]
    assert (
        int(in_units(scores, torch.tensor([[2, 3]]), Gate("sigmoid", None, 2)).ranks.min()) == NEVER
    )
    wanted = demand(torch.tensor([[2, 1]]), scores, kinds_of(1), Layer(4, gate=gate, runners_up=1))
    assert wanted.tolist() == [0, 4 * UNIT, 4 * UNIT, 0]
