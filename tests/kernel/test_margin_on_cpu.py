"""``margin.cuh`` in its three kernels, run on the CPU: the integers of the reference."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sere_ray.kernel.memory import OWN_COUNTERS
from sere_ray.rules import REROUTABLE
from tests.rules.test_sere import RULES, assert_same_ids

from .emulator import COMPILER, launch
from .kernel_cases import check_aligned, empty_alignment, library, rule_arguments
from .margin_cases import (
    EMULATED,
    GATED_SHAPES,
    SHAPES,
    Found,
    MarginCase,
    Rank,
    balanced,
    check_margin,
    check_ranks,
    device_layer,
    kernel_of,
    logit_arguments,
    make_margin_case,
    margin_cases,
    rerouted,
    with_drafts,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernel with")

CPU = torch.device("cpu")


def run(case: MarginCase, *, mode: str = "on", merges: bool = False, **how: Any) -> Found:
    """One launch, see :func:`rerouted`."""
    layer = device_layer(case, CPU, mode, merges=merges)
    return rerouted(kernel_of(case), layer, case.ids, case.weights, case.logits, **how)


Cases = st.SearchStrategy[MarginCase]


def launches_are_the_reference(cases: Cases, cache: Path, examples: int = 25) -> None:
    """However ids are written, sorted and shared out over blocks."""

    @settings(RULES, max_examples=examples)
    @given(
        case=cases,
        seed=st.integers(0, 3),
        inplace=st.booleans(),
        block=st.sampled_from([None, 16, 64]),
        cluster=st.sampled_from([1, 2, 5, 8]),
    )
    def every(case: MarginCase, seed: int, inplace: bool, block: int | None, cluster: int) -> None:
        found = run(case, cache=cache, seed=seed, inplace=inplace, block=block, cluster=cluster)
        check_margin(found, case.expected(EMULATED), case)

    every()


def gated_launches_are_the_reference(cases: Cases, cache: Path, examples: int) -> None:
    """In one block and in all, with and without sorting."""

    @settings(RULES, max_examples=examples)
    @given(
        case=cases,
        seed=st.integers(0, 3),
        block=st.sampled_from([None, 16]),
        cluster=st.sampled_from([1, 8]),
    )
    def every(case: MarginCase, seed: int, block: int | None, cluster: int) -> None:
        found = run(case, cache=cache, seed=seed, block=block, cluster=cluster)
        check_margin(found, case.expected(EMULATED), case)

    every()


@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_equals_reference(experts: int, slots: int, cache: Path) -> None:
    launches_are_the_reference(margin_cases(experts=experts, slots=slots), cache)


@pytest.mark.parametrize(("experts", "slots", "groups"), GATED_SHAPES)
def test_gates_of_every_kind(experts: int, slots: int, groups: int, cache: Path) -> None:
    shape = {"experts": experts, "slots": slots, "groups": groups}
    cases = margin_cases(**shape, id_dtype=torch.int32)
    gated_launches_are_the_reference(cases, cache, examples=25)


@pytest.mark.parametrize("threads", [512, 1024])
def test_block_sizes_as_launched(threads: int, cache: Path) -> None:
    for rows, tau in ((1, 0.1), (16, 0.004), (70, 0.02), (512, 0.05)):
        case = make_margin_case(seed=rows, rows=rows, experts=128, slots=8, floor=8, tau=tau)
        for cluster in (1, 8):
            found = run(case, cache=cache, threads=threads, seed=1, block=16, cluster=cluster)
            check_margin(found, case.expected(EMULATED), case)


@pytest.mark.parametrize("rows", [0, 1, 33, 128, 200])
@pytest.mark.parametrize(("experts", "slots"), [(128, 8), (60, 4)])
def test_a_cluster_of_blocks(experts: int, slots: int, rows: int, cache: Path) -> None:
    """Blocks without a row, with one for some warps, and with several for each."""
    for seed, tau in enumerate((0.0, 0.004, 1.0)):
        case = make_margin_case(seed=seed, rows=rows, experts=experts, slots=slots, tau=tau)
        found = run(case, cache=cache, threads=64, seed=seed, block=16, cluster=8)
        check_margin(found, case.expected(EMULATED), case)


def test_demand_of_many_rows_does_not_overflow(cache: Path) -> None:
    """Every row wants expert 1 as much as its first choice, 0: a quarter each, beyond 31 bits."""
    case = make_margin_case(seed=0, rows=9000, experts=4, slots=2, kinds="decode", tau=1.0)
    case.logits.copy_(torch.tensor([60.0, 60.0, -60.0, -60.0]))
    case.ids.copy_(torch.tensor([0, 1]))
    case.weights.fill_(0.5)
    for cluster in (1, 8):
        ids, weights, counts = run(case, cache=cache, threads=512, seed=2, cluster=cluster)
        check_margin((ids, weights, counts), case.expected(EMULATED), case)
        assert counts == (2, 2, 0, 0, 0, 0)


def observes_and_switches_off(
    case: MarginCase, launches: Sequence[tuple[int | None, int]], cache: Path
) -> None:
    """Launches, each by block size and cluster, that count, and that do nothing."""
    wanted = case.expected(EMULATED)
    assert not torch.equal(wanted[0], case.ids)
    for block, cluster in launches:
        how = {"cache": cache, "block": block, "cluster": cluster, "inplace": False}
        ids, weights, counts = run(case, mode="observe", **how)
        assert_same_ids(ids, case.ids, "observe")
        assert torch.equal(weights, case.weights)
        assert counts == wanted[2]
        ids, weights, counts = run(case, mode="off", **how)
        assert_same_ids(ids, case.ids, "off")
        assert torch.equal(weights, case.weights)
        assert counts == (0,) * OWN_COUNTERS


def test_observe_counts_and_off_does_nothing(cache: Path) -> None:
    case = make_margin_case(seed=3, rows=20, experts=60, slots=4, tau=0.02)
    observes_and_switches_off(case, ((None, 1), (16, 1), (None, 8), (16, 8)), cache)


def test_a_batch_of_one_is_exact(cache: Path) -> None:
    for seed in range(5):
        case = make_margin_case(
            seed=seed, rows=1, experts=128, slots=8, kinds="decode", floor=8, tau=1.0
        )
        ids, weights, counts = run(case, cache=cache)
        assert torch.equal(ids, case.ids)
        assert torch.equal(weights, case.weights)
        assert counts == (8, 8, 0, 0, 0, 0)


def halves_of_ranks(case: MarginCase, split: float, seed: int, cache: Path) -> None:
    """Two launches of each of two ranks, against the rule on the rows of both."""
    kernel = kernel_of(case)
    ranks, wanted = case.split(split), case.expected(EMULATED)
    active = REROUTABLE in case.kinds

    def half(name: str, of_rank: Rank, *numbers: Tensor | None) -> None:
        launch(
            library(kernel, name, 64, cache),
            name,
            *rule_arguments(of_rank.ids, of_rank.ids, of_rank.weights, of_rank.layer),
            *logit_arguments(of_rank.case.logits, of_rank.layer.gate),
            *numbers,
            threads=64,
            seed=seed,
        )

    asked = torch.full((len(ranks), case.logits.shape[1]), -7)
    for of_rank, own in zip(ranks, asked, strict=True):
        half("ask_of_ranks", of_rank, own)
        if active:
            assert torch.equal(own, of_rank.case.asked(EMULATED))
    owner = None if case.owner is None else case.owner.to(torch.uint8)
    for of_rank in ranks:
        read = torch.full((case.logits.shape[1],), 7, dtype=torch.uint8)
        half("reroute_by_asked", of_rank, asked.sum(dim=0), owner, read)
        assert torch.equal(read.bool(), case.read(wanted[0], active=active))
    check_ranks(ranks, wanted, case)


def ranks_keep_one_set(cases: Cases, cache: Path) -> None:
    """Rows of two ranks, in two halves around a sum, against the rule on all of them."""

    @settings(RULES, max_examples=20)
    @given(case=cases, split=st.floats(0, 1), seed=st.integers(0, 3))
    def every(case: MarginCase, split: float, seed: int) -> None:
        halves_of_ranks(case, split, seed, cache)

    every()


@pytest.mark.parametrize(
    ("experts", "slots", "groups"),
    [(128, 8, None), (60, 4, None), (300, 5, None), (4, 1, None), (64, 6, 4)],
)
def test_two_ranks_keep_one_set(experts: int, slots: int, groups: int | None, cache: Path) -> None:
    gated = {} if groups is None else {"groups": groups}
    cases = margin_cases(experts=experts, slots=slots, id_dtype=torch.int32, **gated)
    ranks_keep_one_set(cases, cache)


@pytest.mark.parametrize(("experts", "slots"), [(128, 8), (60, 4), (300, 5), (4, 1)])
def test_the_busiest_of_ranks_decides(experts: int, slots: int, cache: Path) -> None:
    cases = margin_cases(experts=experts, slots=slots, id_dtype=torch.int32)
    on_ranks = st.integers(1, min(experts, 16))
    ranks_keep_one_set(st.builds(balanced, cases, on_ranks), cache)


def test_ranks_in_balance_keep_other_experts(cache: Path) -> None:
    case = make_margin_case(seed=5, rows=24, experts=60, slots=4, kinds="decode", tau=0.02)
    in_balance = balanced(case, 4)
    assert not torch.equal(case.expected(EMULATED)[0], in_balance.expected(EMULATED)[0])
    halves_of_ranks(in_balance, 0.4, 1, cache)


# --- with the gate's top-k in the launch ----------------------------------------------------------


def route(case: MarginCase, *, cache: Path, seed: int, block: int, cluster: int) -> Found:
    """One launch of ``route_and_align``; padding rows are those whose ids are -1."""
    dtype = case.logits.dtype
    kernel = replace(kernel_of(case, torch.int32), logit_dtype=dtype)
    layer = device_layer(case, CPU)
    new_ids, weights = torch.full_like(case.ids, -7), torch.full_like(case.weights, -7)
    aligned, sorted_arguments = empty_alignment(kernel, new_ids, block)
    launch(
        library(kernel, "route_and_align", 512, cache),
        "route_and_align",
        case.logits,
        case.ids[:, 0] < 0,
        0,
        weights,
        None,
        *rule_arguments(new_ids, new_ids, weights, layer)[1:],
        *sorted_arguments,
        threads=512,
        cluster=cluster,
        seed=seed,
    )
    check_aligned(new_ids, aligned, block, case.logits.shape[1])
    return new_ids, weights, tuple(layer.counters[1].tolist())


@pytest.mark.parametrize(
    ("experts", "slots", "dtype"),
    [(128, 8, torch.bfloat16), (64, 6, torch.float32), (256, 8, torch.bfloat16)],
)
def test_routes_then_follows_the_rule(experts, slots, dtype, cache) -> None:
    @settings(RULES, max_examples=12)
    @given(
        case=margin_cases(
            experts=experts,
            slots=slots,
            dtype=dtype,
            id_dtype=torch.int32,
            shuffled=False,
            rows=st.integers(0, 20) | st.sampled_from([63, 64]),
        ),
        seed=st.integers(0, 3),
        block=st.sampled_from([16, 64]),
        cluster=st.sampled_from([1, 2, 8]),
    )
    def every(case: MarginCase, seed: int, block: int, cluster: int) -> None:
        ids, weights = case.ids, case.logits.float().softmax(dim=1)
        gone = (ids < 0).any(dim=1)
        ids[gone] = -1  # a row is padding as a whole
        order = case.logits.float().softmax(dim=1).sort(dim=1, descending=True, stable=True)
        case = case._replace(weights=weights.gather(1, order.indices[:, :slots]))
        found = route(case, cache=cache, seed=seed, block=block, cluster=cluster)
        wanted = case.expected(EMULATED)
        assert_same_ids(found[0], wanted[0], "route")
        assert found[2] == wanted[2]
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-9)

    every()


# --- drafts ---------------------------------------------------------------------------------------


def drafts_count_less(cases: Iterable[MarginCase], cache: Path) -> None:
    """Launches follow what drafts weigh, and at least one batch changes by it."""
    differ = 0
    for seed, case in enumerate(cases):
        drafted = with_drafts(case)
        wanted = drafted.expected(EMULATED)
        differ += not torch.equal(wanted[0], case.expected(EMULATED)[0])
        for block, cluster in ((None, 1), (16, 8)):
            found = run(drafted, cache=cache, seed=seed, block=block, cluster=cluster)
            check_margin(found, wanted, drafted)
    assert differ


@pytest.mark.parametrize(("experts", "slots"), [(128, 8), (60, 4), (300, 5)])
def test_demand_of_drafts_counts_less(experts: int, slots: int, cache: Path) -> None:
    shape = {"rows": 64, "experts": experts, "slots": slots}
    taus = enumerate((0.0005, 0.004, 0.02, 0.1))
    drafts_count_less((make_margin_case(seed=seed, tau=tau, **shape) for seed, tau in taus), cache)


def test_demand_of_drafts_counts_less_where_the_launch_chooses(cache: Path) -> None:
    for seed, tau in enumerate((0.004, 0.02)):
        shape = {"rows": 32, "experts": 64, "slots": 6, "dtype": torch.float32}
        case = make_margin_case(seed=seed, kinds="decode", shuffled=False, tau=tau, **shape)
        drafted = with_drafts(case)
        found, wanted = (
            route(drafted, cache=cache, seed=seed, block=16, cluster=4),
            drafted.expected(EMULATED),
        )
        assert_same_ids(found[0], wanted[0], "route")
        assert found[2] == wanted[2]
