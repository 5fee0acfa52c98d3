"""One union over ranks: what each derives from the reduced vector is its part of the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sere_ray.kernel.cpu_sere import lowest_slot_orders, reroute_and_count, reroute_by_slot_orders
from sere_ray.rules import PADDING, RuleCounts
from sere_ray.rules.sere import (
    UNNAMED,
    apply_rerouting,
    rerouting_of_slot_orders,
    slot_order_bytes,
)

from .test_sere import RULES, Case, assert_same_ids, cases, make_case


@st.composite
def splits(draw: st.DrawFn, rows: int) -> list[Tensor]:
    """Rows dealt to 1 to 5 ranks, some with none, in any order; an index vector per rank."""
    ranks = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    first = draw(st.integers(0, ranks - 1))  # ranks before it are idle
    owner = torch.randint(first, ranks, (rows,), generator=generator)
    return [(owner == rank).nonzero().flatten() for rank in range(ranks)]


def check(case: Case, parts: list[Tensor]) -> None:
    whole = case.reroute()
    policy = {
        "select_top_k": case.select_top_k,
        "threshold": case.threshold,
        "min_primary_experts": case.floor,
    }
    vectors = [
        slot_order_bytes(case.ids[rows], case.weights[rows], case.experts, case.kinds[rows])
        for rows in parts
    ]
    for rows, vector in zip(parts, vectors, strict=True):
        part = case.ids[rows], case.weights[rows], case.kinds[rows]
        found = lowest_slot_orders(*part, case.experts)
        assert found.dtype == vector.dtype == torch.uint8
        assert found.tolist() == vector.tolist()
    reduced = torch.stack(vectors).amin(dim=0)
    rerouting = rerouting_of_slot_orders(reduced, case.similarity, num_slots=case.slots, **policy)
    for rows in parts:
        expected = whole[rows]
        applied = apply_rerouting(rerouting, case.ids[rows], case.kinds[rows])
        assert_same_ids(applied, expected, "reference")
    check_compiled(case, parts, reduced, whole, policy)


def check_compiled(case, parts, reduced, whole, policy) -> None:
    owner = torch.arange(case.experts) % 3
    policy = {**policy, "owner": owner}
    _, counts = reroute_and_count(case.ids, case.weights, case.similarity, case.kinds, **policy)
    for ids, most in (
        (case.ids, counts.experts_max_rank_before),
        (whole, counts.experts_max_rank_after),
    ):
        valid = (ids >= 0) & (ids < case.experts) & (case.kinds != PADDING)[:, None]
        assert most == owner[ids[valid].unique().long()].bincount(minlength=3).max()
    slots = 0
    for rows in parts:
        new_ids, of_rank = reroute_by_slot_orders(
            case.ids[rows], reduced, case.similarity, case.kinds[rows], **policy
        )
        assert_same_ids(new_ids, whole[rows], "CPU implementation")
        assert of_rank._replace(slots_rerouted=0) == counts._replace(slots_rerouted=0)
        slots += of_rank.slots_rerouted
    assert slots == counts.slots_rerouted
    assert RuleCounts._fields == counts._fields[:4]


@settings(RULES, max_examples=150)
@given(case=cases(), data=st.data())
def test_every_rank_derives_its_rows_of_the_whole(case: Case, data: st.DataObject) -> None:
    check(case, data.draw(splits(case.ids.shape[0])))


@settings(RULES, max_examples=40)
@given(case=cases(rows=st.integers(0, 6), gate=True), data=st.data())
def test_few_rows_and_idle_ranks(case: Case, data: st.DataObject) -> None:
    check(case, data.draw(splits(case.ids.shape[0])))


def test_a_rank_of_padding_rows_names_nothing() -> None:
    case = make_case(seed=1, rows=8, experts=16, slots=4, select_top_k=1, kinds="padding")
    for function in (slot_order_bytes, lambda i, w, e, k: lowest_slot_orders(i, w, k, e)):
        vector = function(case.ids, case.weights, case.experts, case.kinds)
        assert vector.tolist() == [UNNAMED] * 16


def test_too_many_slots_for_a_byte() -> None:
    ids = torch.zeros((1, 255), dtype=torch.int64)
    for call in (
        lambda: slot_order_bytes(ids, ids.float(), 4, None),
        lambda: lowest_slot_orders(ids, ids.float(), torch.ones(1, dtype=torch.int8), 4),
    ):
        with pytest.raises(ValueError, match="255 slots; slot orders in a byte go up to 254"):
            call()
