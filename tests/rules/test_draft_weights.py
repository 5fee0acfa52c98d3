"""Demand of rows that verify drafts, under ``margin``: each row by itself, as far as it counts."""

import torch

from sere_ray.rules import EXACT, PADDING, REROUTABLE, Layer
from sere_ray.rules.margin import UNIT, WEIGHT_UNIT, demand, margin
from tests.rules.test_rules import E, draw, kinds_of, layer


def test_demand_is_that_of_each_row_times_its_weight():
    ids, _, scores = draw(12, 3)
    kinds = kinds_of(*[REROUTABLE] * 10, EXACT, PADDING)
    row_weight = torch.tensor([32, 31, 16, 5, 1, 0, 32, 7, 20, 32, 32, 32])
    found = demand(ids, scores, kinds, layer("margin"), row_weight)
    alone = [
        demand(ids[row : row + 1], scores[row : row + 1], kinds[row : row + 1], layer("margin"))
        for row in range(12)
    ]
    by_hand = [
        sum(
            int(of_row[e]) * int(weight) // 32
            for of_row, weight in zip(alone, row_weight, strict=True)
        )
        for e in range(E)
    ]
    assert found.dtype == torch.int64
    assert found.tolist() == by_hand
    assert 0 < found.sum() < demand(ids, scores, kinds, layer("margin")).sum()


def test_rows_of_full_weight_are_those_without_one():
    ids, weights, scores = draw(9, 5)
    kinds = torch.full((9,), REROUTABLE, dtype=torch.int8)
    plain = margin(ids, weights, scores, kinds, layer("margin"))
    whole = torch.full((9,), WEIGHT_UNIT)
    for one, other in zip(
        plain, margin(ids, weights, scores, kinds, layer("margin"), whole), strict=True
    ):
        assert torch.equal(one, other)


def test_a_draft_that_is_never_accepted_keeps_its_first_choice_alone():
    """Expert 1 is wanted by the draft, with a lead of .46 squared; 0 and 2 are first choices."""
    scores = torch.tensor([[0.9, 0.04, 0.03, 0.03], [0.01, 0.46, 0.52, 0.01]])
    ids, kinds = torch.tensor([[0, 1], [2, 1]]), kinds_of(REROUTABLE, REROUTABLE)
    weights = scores.gather(1, ids)
    of_layer = Layer(4, tau=0.1, runners_up=2)
    assert demand(ids, scores, kinds, of_layer)[1] > 0.1 * UNIT
    whole, _ = margin(ids, weights, scores, kinds, of_layer)
    assert whole.tolist() == [[0, 1], [2, 1]]
    rejected, _ = margin(ids, weights, scores, kinds, of_layer, torch.tensor([32, 1]))
    assert rejected[0].tolist() == [0, 2]
    assert rejected[1].tolist() == [2, 0]
