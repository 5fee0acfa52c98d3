"""What training minimises, by hand."""

import math

import pytest
import torch

from sere_ray.masks.losses import (
    balance_penalty,
    batch_penalty,
    distance,
    slots_penalty,
    soft_masks,
    straight_through,
)


def test_forward_counts_slots_and_backward_is_soft():
    logits = torch.tensor([2.0, 0.0, -1.0], requires_grad=True)
    straight_through(logits.sigmoid()).sum().backward()
    assert straight_through(logits.sigmoid()).tolist() == [1, 1, 0]
    soft = logits.detach().sigmoid()
    assert torch.allclose(logits.grad, soft * (1 - soft))


def test_first_choices_take_no_part():
    router = torch.ones(4, 3, requires_grad=True)
    hidden, ids = torch.ones(2, 3), torch.tensor([[1, 2], [0, 3]])
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    soft = soft_masks(hidden, ids, weights, router, keep_first=True)
    usual = 1 / (1 + math.exp(-3))
    assert soft.detach().flatten().tolist() == pytest.approx([1, usual, usual, 1])
    slots_penalty(soft).backward()
    assert router.grad.sum(dim=1).ne(0).tolist() == [True, False, True, False]


def test_experts_of_a_batch_by_hand():
    """Two texts of two positions: (0, 1), (2, 3) and (0, 1), (0, 3), two slots of one expert each.

    Position 0 has expert 0 twice, position 1 has experts 2 and 0: one and two are named.
    """
    ids = torch.tensor([[0], [2], [0], [0]])
    soft = torch.tensor([[0.5], [0.25], [0.8], [1.0]], requires_grad=True)
    share = batch_penalty(soft, ids, 5, (2, 2))
    expected = ((1 - 0.5 * 0.2) + (0.25 + 1.0) / 2) / 2
    assert float(share.detach()) == pytest.approx(expected, abs=1e-3)
    share.backward()
    assert float(soft.grad[0]) == pytest.approx(0.2 / 2, abs=1e-4), "the other row may keep it"
    assert torch.isfinite(soft.grad).all(), "also where a mask is 1"
    hard = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
    assert float(batch_penalty(hard, ids, 5, (2, 2))) == pytest.approx((1 + 1 / 2) / 2, abs=1e-3)
    two_batches = batch_penalty(hard, ids, 5, (1, 2))
    assert float(two_batches) == pytest.approx(2 / 4, abs=1e-3), "four batches of one row"


def test_balance_is_one_where_all_have_the_same():
    ids = torch.arange(8).view(4, 2)
    assert float(balance_penalty(torch.full((4, 2), 0.9), ids, 8)) == pytest.approx(1)
    uneven = torch.full((4, 2), 0.1)
    uneven[0, 0] = 0.9
    assert float(balance_penalty(uneven, ids, 8)) > 4


def test_distance():
    logits = torch.randn(3, 5, 7)
    exact = logits.log_softmax(-1)
    assert float(distance(exact, logits + 3)) == pytest.approx(0, abs=1e-6)
    other = torch.randn(3, 5, 7)
    wanted = (exact.exp() * (exact - other.log_softmax(-1))).sum(-1).mean()
    assert float(distance(exact, other)) == pytest.approx(float(wanted), rel=1e-5)
