"""The compiled loops over many steps return what the rules in torch return, bit for bit."""

import pytest
import torch

from sere_ray.evaluation.compiled_rules import compiled
from sere_ray.rules import REROUTABLE, RULES, Layer


@pytest.mark.parametrize("tau", [0.004, 0.1])
@pytest.mark.parametrize("shape", [(5, 16), (3, 2, 4), (1, 1)])
def test_margin_over_steps(shape, tau):
    g = torch.Generator().manual_seed(1)
    scores = (1.5 * torch.randn((*shape, 48), generator=g)).softmax(dim=-1)
    weights, ids = scores.topk(4)
    kinds = torch.full(shape, REROUTABLE, dtype=torch.int8)
    layer = Layer(48, tau=tau, min_primary_experts=4)
    found = compiled("margin", ids, weights, scores, layer)
    expected = RULES["margin"].apply(ids, weights, scores, kinds, layer)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_other_rules_have_no_loops():
    ids, weights = torch.zeros((1, 1, 1), dtype=torch.int64), torch.ones((1, 1, 1))
    assert compiled("spare", ids, weights, weights, Layer(1)) is None
