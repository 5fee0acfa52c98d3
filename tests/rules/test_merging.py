"""Step 7: a row names an expert once. The reference and the CPU loops against the oracle."""

import doctest

import pytest
import torch
from hypothesis import given, settings

from sere_ray.kernel import cpu_sere
from sere_ray.rules import EXACT, PADDING, REROUTABLE, RULES, Layer, merge_repeated, merging
from tests.rules.test_sere import RULES as PROFILE
from tests.rules.test_sere import Case, assert_same_ids, cases

from . import oracle


@pytest.mark.parametrize(
    ("ids", "weights", "kind", "merged_ids", "merged_weights"),
    [
        pytest.param([3, 3, 3], [4, 2, 1], REROUTABLE, [3, -1, -1], [7, 0, 0], id="all"),
        pytest.param([3, 5, 3], [1, 2, 4], REROUTABLE, [-1, 5, 3], [0, 2, 5], id="best is last"),
        pytest.param([3, 5, 3], [2, 4, 2], REROUTABLE, [3, 5, -1], [4, 4, 0], id="tie: first"),
        pytest.param([3, 5, 4], [2, 4, 2], REROUTABLE, [3, 5, 4], [2, 4, 2], id="distinct"),
        pytest.param([-1, -1, 3], [2, 4, 1], REROUTABLE, [-1, -1, 3], [2, 4, 1], id="sentinels"),
        pytest.param([8, 8, 3], [2, 4, 1], REROUTABLE, [8, 8, 3], [2, 4, 1], id="beyond E"),
        pytest.param([3, 3, 5], [2, 1, 1], EXACT, [3, 3, 5], [2, 1, 1], id="exact row"),
        pytest.param([3, 3, 5], [2, 1, 1], PADDING, [3, 3, 5], [2, 1, 1], id="padding row"),
    ],
)
def test_worked_by_hand(ids, weights, kind, merged_ids, merged_weights):
    expected = [merged_ids], [merged_weights]
    assert oracle.merge([ids], [weights], [kind], 8) == expected
    kinds = torch.tensor([kind], dtype=torch.int8)
    rows = torch.tensor([ids]), torch.tensor([weights], dtype=torch.float32)
    new_ids, new_weights = merge_repeated(*rows, row_kind=kinds, num_experts=8)
    assert (new_ids.tolist(), new_weights.tolist()) == expected


def test_sums_are_in_slot_order_and_in_float32():
    weights = torch.tensor([[1.0, 2.0**-24, 2.0**-24]])
    ids = torch.zeros((1, 3), dtype=torch.int32)
    assert merge_repeated(ids, weights)[1][0, 0] == 1  # each is too small for a sum of 1
    assert merge_repeated(ids, weights.flip(1))[1][0, 2] == 1 + 2.0**-23


@settings(PROFILE, max_examples=150)
@given(case=cases())
def test_equals_oracle(case: Case) -> None:
    new = case.reroute()
    before = new.clone(), case.weights.clone()
    weights = case.weights.float()
    expected_ids, expected_weights = oracle.merge(
        new.tolist(), weights.tolist(), case.kinds.tolist(), case.experts
    )
    ids, merged = merge_repeated(new, weights, row_kind=case.kinds, num_experts=case.experts)
    assert_same_ids(ids, expected_ids, "merge_repeated")
    assert merged.tolist() == expected_weights
    # Weights of any type: their order is that of the type, a sum is rounded to it.
    reference = merge_repeated(new, case.weights, row_kind=case.kinds, num_experts=case.experts)
    of_loops = cpu_sere.merge_repeated(new, case.weights, case.kinds, case.experts)
    assert_same_ids(of_loops[0], reference[0], "CPU loops")
    assert torch.equal(of_loops[1], reference[1])
    assert of_loops[1].dtype == case.weights.dtype
    assert of_loops[2] == int((reference[0] != new).sum())
    assert torch.equal(new, before[0])
    assert torch.equal(case.weights, before[1])


@settings(PROFILE, max_examples=80)
@given(case=cases(gate=True))
def test_after_the_rule_a_row_names_an_expert_once(case: Case) -> None:
    layer = Layer(
        case.experts,
        case.similarity.contiguous(),
        select_top_k=case.select_top_k,
        threshold=case.threshold,
        min_primary_experts=case.floor,
    )
    ids, weights = RULES["sere"].apply(case.ids, case.weights.float(), None, case.kinds, layer)
    for row, of_row in zip(ids.tolist(), weights, strict=True):
        named = [e for e in row if e >= 0]
        assert len(set(named)) == len(named)
        assert all(weight == 0 for e, weight in zip(row, of_row.tolist(), strict=True) if e < 0)
    assert torch.allclose(weights.sum(dim=1), case.weights.float().sum(dim=1), atol=1e-5)


def test_leading_dimensions_are_steps_of_their_own():
    ids = torch.randint(0, 4, (3, 2, 5, 4))
    weights = torch.rand(ids.shape)
    at_once = merge_repeated(ids, weights)
    for i in range(3):
        for j in range(2):
            alone = merge_repeated(ids[i, j], weights[i, j])
            assert torch.equal(at_once[0][i, j], alone[0])
            assert torch.equal(at_once[1][i, j], alone[1])


def test_the_example():
    assert doctest.testmod(merging, extraglobs={"torch": torch}).failed == 0
