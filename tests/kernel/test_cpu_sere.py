"""The CPU implementation gives the integers of the reference, counters included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_ray.kernel.cpu_sere import reroute_and_count
from sere_ray.rules import count
from tests.rules.test_sere import RULES, Case, assert_same_ids, cases, make_case


def check(case: Case) -> None:
    before = [tensor.clone() for tensor in case.tensors]
    new, counts = reroute_and_count(
        case.ids,
        case.weights,
        case.similarity,
        case.kinds,
        select_top_k=case.select_top_k,
        threshold=case.threshold,
        min_primary_experts=case.floor,
    )
    expected = case.reroute()
    assert_same_ids(new, expected, "CPU implementation")
    assert new.dtype == case.ids.dtype
    reference = count(case.rerouting(), case.ids, expected, case.row_kind)
    assert counts[:4] == tuple(int(number) for number in reference)
    assert counts[6:8] == counts[:2], "one rank holds all experts"
    for tensor, copy in zip(case.tensors, before, strict=True):
        assert torch.equal(tensor, copy)


@settings(RULES, max_examples=200)
@given(case=cases())
def test_equals_reference(case: Case) -> None:
    check(case)


@settings(RULES)
@given(case=cases(rows=st.integers(0, 1)))
def test_small_batches(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(("rows", "experts", "slots"), [(100_000, 128, 8), (131_072, 512, 4)])
def test_many_rows(rows: int, experts: int, slots: int) -> None:
    check(make_case(seed=7, rows=rows, experts=experts, slots=slots, select_top_k=2, gate=True))


def test_bf16_weights_rank_as_they_are() -> None:
    case = make_case(
        seed=3, rows=64, experts=32, slots=8, select_top_k=2, weight_dtype=torch.bfloat16
    )
    check(case)
