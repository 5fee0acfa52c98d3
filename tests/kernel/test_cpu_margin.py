"""The compiled loops of ``margin`` return the bits of the reference, weights included."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_ray.kernel import cpu_margin
from sere_ray.rules import margin, name_dropped
from sere_ray.rules.gate import scores_of
from tests.kernel.margin_cases import (
    GATED_SHAPES,
    SHAPES,
    MarginCase,
    make_margin_case,
    margin_cases,
)
from tests.rules.test_sere import RULES


def check(case: MarginCase, *, ranks: int = 1, balances: bool = False) -> None:
    experts = case.logits.shape[1]
    owner = torch.arange(experts) * ranks // experts
    layer = replace(case.layer, balance_ranks=balances, owner=owner)
    rows = case.ids, case.weights, scores_of(case.logits, case.gate), case.kinds
    given = [tensor.clone() for tensor in rows]
    asked = margin.ask(*rows, layer, case.row_weight)
    assert torch.equal(cpu_margin.ask(*rows, layer, case.row_weight), asked)
    asked = asked * ranks  # as of ranks with the same rows
    kept = margin.keep(asked, layer)
    assert torch.equal(cpu_margin.keep(asked, layer), kept)
    given_up = margin.demand_given_up(asked, layer)
    assert torch.equal(cpu_margin.demand_given_up(asked, layer), given_up)
    new_ids, new_weights = margin.refill_rows(kept, *rows, layer)
    found_ids, found_weights = cpu_margin.refill_rows(kept, *rows, layer)
    assert torch.equal(found_ids, new_ids)
    assert found_ids.dtype == case.ids.dtype
    assert torch.equal(bits(found_weights), bits(new_weights))
    for tensor, copy in zip(rows, given, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
    check_counts(case, new_ids)
    named = margin.is_named(asked)
    most = max((int(named[owner == rank].sum()) for rank in range(ranks)), default=0)
    assert cpu_margin.busiest(named, owner) == most


def check_counts(case: MarginCase, new_ids: torch.Tensor) -> None:
    stayed = (new_ids[:, :, None] == case.ids[:, None, :]).any(dim=2)
    rerouted = int((~stayed)[case.kinds != 0].sum())
    dropped = int(((new_ids < 0) & (case.ids >= 0)).sum())
    for names in (False, True):
        ids = new_ids.clone()
        found = cpu_margin.finish(case.ids, ids, case.kinds, names_dropped=names)
        assert found == (rerouted, dropped)
        assert torch.equal(ids, name_dropped(new_ids, case.ids) if names else new_ids)


def bits(weights: torch.Tensor) -> torch.Tensor:
    assert weights.dtype in (torch.float32, torch.bfloat16)
    return weights.view(torch.int32 if weights.dtype == torch.float32 else torch.int16)


@settings(RULES, max_examples=40)
@given(data=st.data(), ranks=st.integers(1, 4), balances=st.booleans())
@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_plain_gates(experts, slots, data, ranks, balances):
    case = data.draw(margin_cases(experts=experts, slots=slots))
    check(case, ranks=ranks, balances=balances)


@settings(RULES, max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize(("experts", "slots", "groups"), GATED_SHAPES)
def test_gates_with_biases_and_groups(experts, slots, groups, data):
    check(data.draw(margin_cases(experts=experts, slots=slots, groups=groups)))


@settings(RULES, max_examples=50)
@given(data=st.data())
def test_drafts(data):
    case = data.draw(margin_cases(experts=33, slots=4))
    g = torch.Generator().manual_seed(0)
    weights = torch.randint(0, margin.WEIGHT_UNIT + 1, (len(case.ids),), generator=g)
    check(case._replace(row_weight=weights))


@pytest.mark.parametrize("beta", [0.5, 0.3])
def test_many_rows_and_bf16_weights(beta):
    case = make_margin_case(
        seed=7, rows=20_000, experts=128, slots=8, kinds="decode", tau=1.0, floor=8, beta=beta
    )
    check(case)
    small = make_margin_case(seed=8, rows=64, experts=128, slots=8, kinds="mixed", tau=0.5)
    check(small._replace(weights=small.weights.to(torch.bfloat16)))


def test_logits_that_are_not_numbers():
    case = make_margin_case(seed=9, rows=16, experts=16, slots=4, kinds="decode", tau=0.5)
    case.logits[3, case.ids[3, 0]] = torch.nan
    case.logits[5] = -torch.inf
    case.logits[5, case.ids[5].long()] = 0.0
    check(case)
