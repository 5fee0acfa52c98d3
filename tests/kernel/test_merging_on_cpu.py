"""Step 7 in the kernels, run on the CPU: where experts' code skips ids of -1, a row names an expert
once."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_ray.kernel.memory import NUM_COUNTERS
from sere_ray.rules import REROUTABLE
from tests.rules.test_sere import RULES, Case, assert_same_ids, cases, make_case

from .emulator import COMPILER, launch
from .kernel_cases import (
    NO_LOGITS,
    as_launched,
    check_aligned,
    device_layer,
    empty_alignment,
    expected,
    kernel_of,
    library,
    merged,
    rule_arguments,
    two_ranks,
)
from .margin_cases import EMULATED, make_margin_case
from .test_margin_on_cpu import run as run_margin
from .test_route_on_cpu import gate_logits, route, top_k

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernel with")

CPU = torch.device("cpu")
SHAPES = [(128, 8), (60, 4), (33, 16), (300, 5), (9, 3)]


def check(case: Case, name: str, *others, cache: Path, seed: int = 0, own=None, counters=None):
    """One launch that re-routes in place; returns the ids."""
    ids, weights = case.ids.clone(), case.weights.clone()
    layer = device_layer(case, CPU, own=own, counters=counters, merges=True)
    launch(
        library(kernel_of(case), name, 64, cache),
        name,
        *rule_arguments(ids, ids, weights, layer),
        *others,
        threads=64,
        seed=seed,
    )
    wanted_ids, wanted_weights, number = merged(case)
    if REROUTABLE not in case.kinds:
        wanted_ids, wanted_weights, number = case.ids, case.weights, 0
    assert_same_ids(ids, wanted_ids, name)
    assert torch.equal(weights, wanted_weights)
    if own is None:
        assert layer.counters[1].tolist() == [*expected(case)[1][:4], number, 0]
    return ids


@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_equals_reference(experts: int, slots: int, cache: Path) -> None:
    @settings(RULES, max_examples=25)
    @given(
        case=cases(experts=experts, slots=slots, rows=st.integers(0, 40)),
        seed=st.integers(0, 3),
        block=st.sampled_from([None, 16, 64]),
    )
    def every(case: Case, seed: int, block: int | None) -> None:
        case = as_launched(case)
        if block is None:
            check(case, "reroute", *NO_LOGITS, cache=cache, seed=seed)
            return
        aligned, sorting = empty_alignment(kernel_of(case), case.ids, block)
        ids = check(case, "reroute_and_align", *NO_LOGITS, *sorting, cache=cache, seed=seed)
        check_aligned(ids, aligned, block, experts)

    every()


@settings(RULES, max_examples=25)
@given(case=cases(experts=60, slots=4, rows=st.integers(0, 40)), split=st.floats(0, 1))
def test_every_rank_merges_the_gathered_rows(case: Case, split: float, cache: Path) -> None:
    case = as_launched(case)
    number, slots = 0, merged(case)
    for own, placement in two_ranks(case, split, round_robin=False):
        counters = torch.zeros((2, NUM_COUNTERS), dtype=torch.int64)
        check(case, "reroute_gathered", *placement, cache=cache, own=own, counters=counters)
        number += int(counters[1, 4])
    assert number == (slots[2] if REROUTABLE in case.kinds else 0)


def test_sums_are_those_of_the_reference_for_every_weight(cache: Path) -> None:
    """Random floats: another order of addition gives other bits."""
    for seed in range(8):
        shape = {"rows": 40, "experts": 128, "slots": 8, "kinds": "re-routable"}
        case = as_launched(make_case(seed=seed, select_top_k=1, gate=True, tied=False, **shape))
        assert merged(case)[2] > 10
        check(case, "reroute", *NO_LOGITS, cache=cache)


def test_observe_merges_nothing(cache: Path) -> None:
    case = as_launched(make_case(seed=1, rows=20, experts=60, slots=4, select_top_k=1, gate=True))
    ids, weights = case.ids.clone(), case.weights.clone()
    layer = device_layer(case, CPU, "observe", merges=True)
    arguments = rule_arguments(ids, ids, weights, layer)
    launch(
        library(kernel_of(case), "reroute", 64, cache),
        "reroute",
        *arguments,
        *NO_LOGITS,
        threads=64,
    )
    assert torch.equal(ids, case.ids)
    assert torch.equal(weights, case.weights)
    assert layer.counters[1, 4] == 0 < layer.counters[1, 2]


@pytest.mark.parametrize("renormalize", [False, True])
def test_with_the_gates_choice_in_the_launch(renormalize: bool, cache: Path) -> None:
    for seed in range(4):
        logits = gate_logits(20, 128, torch.bfloat16, seed, tied=False)
        ids, weights = top_k(logits, 8, renormalize=renormalize)
        case = make_case(
            seed=seed, rows=20, experts=128, slots=8, select_top_k=1, id_dtype=torch.int32
        )
        case = Case(case.recipe, ids, weights, case.similarity, case.row_kind, 1, None, 0)
        found = route(
            case,
            logits,
            None,
            cache=cache,
            threads=512,
            seed=seed,
            block=16,
            renormalize=renormalize,
            merges=True,
        )
        wanted_ids, wanted_weights, number = merged(case)
        assert_same_ids(found[0], wanted_ids, "route")
        torch.testing.assert_close(found[1], wanted_weights, rtol=1e-5, atol=1e-7)
        assert found[2][4] == number > 0


@pytest.mark.parametrize("cluster", [1, 8])
def test_margin_drops_what_it_does_not_fill(cluster: int, cache: Path) -> None:
    """Few experts are kept, so that rows find fewer than K."""
    case = make_margin_case(seed=2, rows=6, experts=60, slots=8, kinds="decode", tau=1.0)
    named = case.expected(EMULATED)
    ids, weights, counts = run_margin(case, cache=cache, block=16, cluster=cluster, merges=True)
    first = named[0][:, :1].expand_as(ids)
    repeats = (named[0] == first) & (torch.arange(8) > 0) & (named[1] == 0)
    assert_same_ids(ids, named[0].masked_fill(repeats, -1), "margin")
    torch.testing.assert_close(weights, named[1], rtol=1e-5, atol=1e-9)
    assert counts == (*named[2][:4], int(repeats.sum()), 0)
    assert repeats.any()
