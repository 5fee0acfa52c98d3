"""`prefer_local_rank`: reference and CPU loops against the oracle, and what it must not change."""

import doctest
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sere_ray.kernel.cpu_sere import lowest_ranks, reroute_and_count, reroute_by_ranks
from sere_ray.rules import EXACT, NO_RANK, PADDING, LocalRanks, count, local_rank, reroute_local
from sere_ray.rules.local_rank import apply_plan_local
from sere_ray.rules.sere import plan_from_ranks, rank_vector

from . import oracle
from .test_sere import RULES, Case, assert_same_ids, cases, make_case

TOLERANCES = ("zero", "tiny", "gap", "below gap", "decimal", "huge")


def make_local(case: Case, seed: int, ranks: int, placement: str, tolerance: str) -> LocalRanks:
    g = torch.Generator().manual_seed(seed)
    experts, rows = case.experts, case.ids.shape[0]
    owner = {
        "linear": torch.arange(experts) * ranks // experts,
        "round_robin": torch.arange(experts) % ranks,
        "random": torch.randint(0, ranks, (experts,), generator=g),
    }[placement]
    some = torch.randint(0, experts, (3,), generator=g).tolist()
    one, two = float(case.similarity[some[0], some[1]]), float(case.similarity[some[0], some[2]])
    number = {
        "zero": 0.0,
        "tiny": 1e-12,  # rounds away: like zero
        "gap": abs(one - two),  # a stand-in at exactly this distance is not taken
        "below gap": abs(one - two) * 1.0001,
        "decimal": 0.1 * int(torch.randint(1, 11, (1,), generator=g)),
        "huge": 1e30,
    }[tolerance]
    return LocalRanks(owner, torch.randint(NO_RANK, ranks, (rows,), generator=g), number)


@st.composite
def local_cases(draw: st.DrawFn, **fixed: Any) -> tuple[Case, LocalRanks]:
    case = draw(cases(rows=st.integers(0, 40), **fixed))
    local = make_local(
        case,
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from(["linear", "round_robin", "random"])),
        draw(st.sampled_from(TOLERANCES)),
    )
    return case, local


def policy(case: Case) -> dict[str, Any]:
    return {
        "select_top_k": case.select_top_k,
        "threshold": case.threshold,
        "min_primary_experts": case.floor,
    }


def reference(case: Case, local: LocalRanks) -> Tensor:
    return reroute_local(
        case.ids, case.weights, case.similarity, local, row_kind=case.row_kind, **policy(case)
    )


def expected_of(case: Case, local: LocalRanks) -> oracle.Outcome:
    return oracle.reroute_local(
        case.ids.tolist(),
        case.weights.tolist(),
        case.similarity.tolist(),
        owner=local.owner.tolist(),
        home=local.home.tolist(),
        tolerance=local.tolerance,
        num_slots=case.slots,
        row_kind=None if case.row_kind is None else case.row_kind.tolist(),
        **policy(case),
    )


def check(case: Case, local: LocalRanks) -> Tensor:
    """Oracle, reference and loops are equal; what only the plain rule decides is as it was."""
    before = [tensor.clone() for tensor in (*case.tensors, local.owner, local.home)]
    expected = expected_of(case, local)
    new = reference(case, local)
    assert new.dtype == case.ids.dtype
    assert_same_ids(new, expected.ids, "reference")
    compiled, counts = reroute_and_count(
        case.ids, case.weights, case.similarity, case.kinds, local=local, **policy(case)
    )
    assert compiled.dtype == case.ids.dtype
    assert_same_ids(compiled, new, "CPU implementation")
    assert counts[:4] == (
        expected.experts_before,
        expected.experts_after,
        expected.slots_rerouted,
        expected.critical_kept,
    )
    plain = case.reroute()
    of_plain = tuple(int(n) for n in count(case.plan(), case.ids, plain, case.row_kind))
    assert counts[:4] == of_plain, "slots and experts read are the plain rule's"
    assert torch.equal(new != case.ids, plain != case.ids)
    untouched = (case.kinds == EXACT) | (case.kinds == PADDING)
    assert torch.equal(new[untouched], case.ids[untouched])
    for tensor, copy in zip((*case.tensors, local.owner, local.home), before, strict=True):
        assert torch.equal(tensor, copy)
    return new


@settings(RULES, max_examples=250)
@given(drawn=local_cases())
def test_equals_oracle(drawn: tuple[Case, LocalRanks]) -> None:
    check(*drawn)


@settings(RULES, max_examples=150)
@given(drawn=local_cases(gate=True, experts=st.sampled_from([8, 16, 64]), kinds="decode"))
def test_what_a_gate_returns(drawn: tuple[Case, LocalRanks]) -> None:
    check(*drawn)


@settings(RULES)
@given(drawn=local_cases())
def test_tolerance_zero_is_the_plain_rule(drawn: tuple[Case, LocalRanks]) -> None:
    case, local = drawn
    assert_same_ids(check(case, local._replace(tolerance=0.0)), case.reroute(), "tolerance 0")


@settings(RULES)
@given(drawn=local_cases())
def test_one_rank_is_the_plain_rule(drawn: tuple[Case, LocalRanks]) -> None:
    case, local = drawn
    alone = LocalRanks(local.owner * 0, local.home.clamp(max=0), local.tolerance)
    assert_same_ids(check(case, alone), case.reroute(), "one rank")


@settings(RULES)
@given(drawn=local_cases(), data=st.data())
def test_slot_order_does_not_matter(drawn: tuple[Case, LocalRanks], data: st.DataObject) -> None:
    """Permuted slots give permuted ids, where no two weights of a row are equal."""
    case, local = drawn
    order = torch.tensor(data.draw(st.permutations(range(case.slots))), dtype=torch.long)
    weights = case.weights.double()
    weights = weights + torch.arange(case.slots) * 1e-6
    shuffled = reroute_local(
        case.ids[:, order],
        weights[:, order],
        case.similarity,
        local,
        row_kind=case.row_kind,
        **policy(case),
    )
    straight = reroute_local(
        case.ids, weights, case.similarity, local, row_kind=case.row_kind, **policy(case)
    )
    assert_same_ids(shuffled, straight[:, order], "permuted")


@settings(RULES, max_examples=100)
@given(drawn=local_cases(), data=st.data())
def test_one_union_over_ranks(drawn: tuple[Case, LocalRanks], data: st.DataObject) -> None:
    """Each rank derives its rows of the whole from the reduced rank vector."""
    case, local = drawn
    whole = reference(case, local)
    parts = [(local.home == rank).nonzero().flatten() for rank in range(NO_RANK, 9)]
    vectors = []
    for rows in parts:
        mine = case.ids[rows], case.weights[rows]
        vectors.append(lowest_ranks(*mine, case.kinds[rows], case.experts))
        assert torch.equal(vectors[-1], rank_vector(*mine, case.experts, case.kinds[rows]))
    reduced = torch.stack(vectors).amin(dim=0)
    plan = plan_from_ranks(reduced, case.similarity, num_slots=case.slots, **policy(case))
    for rows in parts:
        kinds, own = case.kinds[rows], local._replace(home=local.home[rows])
        new = apply_plan_local(plan, case.ids[rows], case.similarity, own, kinds, case.threshold)
        assert_same_ids(new, whole[rows], "reference")
        new, _ = reroute_by_ranks(
            case.ids[rows], reduced, case.similarity, kinds, local=own, **policy(case)
        )
        assert_same_ids(new, whole[rows], "CPU implementation")


@settings(RULES)
@given(drawn=local_cases(gate=True, kinds="re-routable", floor=0, tied=False))
def test_never_visits_more_ranks_than_its_stand_ins_without(
    drawn: tuple[Case, LocalRanks],
) -> None:
    """A slot moves only onto a rank that is visited anyway, so no row gains a rank."""
    case, local = drawn
    plain, new = case.reroute(), check(case, local)
    for row in range(len(new)):

        def ranks(ids: Tensor, row: int = row) -> set[int]:
            return {int(local.owner[e]) for e in ids[row].tolist()} - {int(local.home[row])}

        assert ranks(new) <= ranks(plain)


def test_worked_by_hand() -> None:
    """P = {0, 2}, on ranks 0 and 1. Expert 1 is most similar to 0, expert 3 to 2."""
    similarity = torch.tensor(
        [[1.0, 0, 0, 0], [0.9, 1, 0.75, 0], [0, 0, 1, 0], [0.25, 0, 0.5, 1]], dtype=torch.float32
    )
    ids = torch.tensor([[0, 1], [2, 1], [2, 3], [0, 3]])
    weights = torch.tensor([[2.0, 1.0]] * 4)
    owner = torch.tensor([0, 0, 1, 1])

    def rule(home: list[int], tolerance: float, **arguments: Any) -> list[list[int]]:
        local = LocalRanks(owner, torch.tensor(home), tolerance)
        return reroute_local(ids, weights, similarity, local, select_top_k=1, **arguments).tolist()

    plain = [[0, 0], [2, 0], [2, 2], [0, 2]]
    assert rule([NO_RANK] * 4, 0.0) == plain
    # Row 1 keeps 2 on rank 1: there 2 is near enough to 0 (0.75 > 0.9 - 0.2).
    assert rule([NO_RANK] * 4, 0.2) == [[0, 0], [2, 2], [2, 2], [0, 2]]
    # With home 0 it is on rank 0 anyway, where the best stand-in lives.
    assert rule([0] * 4, 0.2) == plain
    # 0.25 of row 3 is exactly a tolerance of 0.25 away: not taken; it is at 0.3.
    assert rule([NO_RANK] * 4, 0.25) == [[0, 0], [2, 2], [2, 2], [0, 2]]
    assert rule([NO_RANK] * 4, 0.3) == [[0, 0], [2, 2], [2, 2], [0, 0]]
    # Nor where the threshold refuses it.
    assert rule([NO_RANK] * 4, 0.3, threshold=0.3) == [[0, 0], [2, 2], [2, 2], [0, 2]]
    assert rule([NO_RANK] * 4, 1.0, threshold=0.8) == [[0, 0], [2, 0], [2, 3], [0, 3]]


@pytest.mark.parametrize(("rows", "experts", "slots"), [(20_000, 128, 8), (4096, 256, 8)])
def test_many_rows(rows: int, experts: int, slots: int) -> None:
    case = make_case(seed=7, rows=rows, experts=experts, slots=slots, select_top_k=2, gate=True)
    local = make_local(case, 1, 8, "linear", "decimal")
    new, _ = reroute_and_count(
        case.ids, case.weights, case.similarity, case.kinds, local=local, **policy(case)
    )
    assert_same_ids(new, reference(case, local), "CPU implementation")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"owner": torch.zeros(3, dtype=torch.int64)}, r"owner must be int64 \[4\]"),
        ({"home": torch.zeros(1, dtype=torch.int32)}, r"home must be int64 \[2\]"),
        ({"tolerance": -0.1}, "tolerance must be >= 0"),
        ({"tolerance": float("nan")}, "tolerance must be >= 0"),
    ],
)
def test_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    case = make_case(seed=0, rows=2, experts=4, slots=2, select_top_k=1, gate=True)
    with pytest.raises(ValueError, match=message):
        reference(case, make_local(case, 0, 2, "linear", "zero")._replace(**change))


def test_example() -> None:
    results = doctest.testmod(local_rank)
    assert results.failed == 0
    assert results.attempted > 0
