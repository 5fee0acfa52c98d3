"""``kernels/cuda/reroute.cu``, run on the CPU: its source, its barriers, its integers."""

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_ray.kernel.memory import OWN_COUNTERS
from tests.rules.test_sere import RULES, Case, assert_same_ids, cases, make_case

from .emulator import COMPILER, launch
from .kernel_cases import (
    NO_LOGITS,
    SHAPES,
    as_launched,
    check,
    check_aligned,
    device_layer,
    empty_alignment,
    expected,
    kernel_of,
    library,
    odd_cases,
    rule_arguments,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernel with")

CPU = torch.device("cpu")


def arguments(case: Case, ids, new_ids, mode: str = "on", weights=None, merges: bool = False):
    layer = device_layer(case, CPU, mode, merges=merges)
    weights = case.weights if weights is None else weights
    return rule_arguments(ids, new_ids, weights, layer), layer.counters


def run(
    case: Case,
    *,
    cache: Path,
    threads: int,
    seed: int,
    inplace: bool,
    mode: str = "on",
    cluster: int = 1,
):
    kernel = kernel_of(case)
    ids = case.ids.clone()
    new_ids = ids if inplace else torch.full_like(ids, -7)
    packed, counters = arguments(case, ids, new_ids, mode)
    launch(
        library(kernel, "reroute", threads, cache),
        "reroute",
        *packed,
        *NO_LOGITS,
        threads=threads,
        cluster=cluster,
        seed=seed,
    )
    assert counters[0].tolist() == [0] * OWN_COUNTERS
    if not inplace:
        assert torch.equal(ids, case.ids)
    return new_ids, tuple(counters[1].tolist())


@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_equals_reference(experts: int, slots: int, cache: Path) -> None:
    @settings(RULES, max_examples=25)
    @given(
        case=cases(experts=experts, slots=slots, gate=False, rows=st.integers(0, 40)),
        seed=st.integers(0, 3),
        inplace=st.booleans(),
        cluster=st.sampled_from([1, 1, 8]),
    )
    def every(case: Case, seed: int, inplace: bool, cluster: int) -> None:
        how = {"seed": seed, "inplace": inplace, "cluster": cluster}
        check(functools.partial(run, cache=cache, threads=64, **how), case)

    every()


@pytest.mark.parametrize("threads", [512, 1024])
@pytest.mark.parametrize(("experts", "slots"), [(128, 8), (60, 4)])
def test_block_sizes_as_launched(experts: int, slots: int, threads: int, cache: Path) -> None:
    for case in odd_cases(experts, slots):
        check(functools.partial(run, cache=cache, threads=threads, seed=1, inplace=True), case)


def test_observe_counts_and_leaves_ids_alone(cache: Path) -> None:
    case = as_launched(
        make_case(seed=2, rows=20, experts=60, slots=4, select_top_k=1, kinds="mixed", gate=True)
    )
    ids, counts = run(case, cache=cache, threads=64, seed=0, inplace=True, mode="observe")
    assert torch.equal(ids, case.ids)
    assert counts == expected(case)[1]
    ids, counts = run(case, cache=cache, threads=64, seed=0, inplace=False, mode="off")
    assert torch.equal(ids, case.ids)
    assert counts == (0,) * OWN_COUNTERS


def align(
    case: Case,
    *,
    cache: Path,
    threads: int,
    seed: int,
    block: int,
    mode: str = "on",
    cluster: int = 1,
):
    kernel = kernel_of(case)
    ids = case.ids.clone()
    packed, counters = arguments(case, ids, ids, mode)
    aligned, sorted_arguments = empty_alignment(kernel, ids, block)
    launch(
        library(kernel, "reroute_and_align", threads, cache),
        "reroute_and_align",
        *packed,
        *NO_LOGITS,
        *sorted_arguments,
        threads=threads,
        cluster=cluster,
        seed=seed,
    )
    check_aligned(ids, aligned, block, case.experts)
    return ids, tuple(counters[1].tolist())


@pytest.mark.parametrize(("experts", "slots"), [(128, 8), (60, 4), (300, 5)])
def test_aligned(experts: int, slots: int, cache: Path) -> None:
    @settings(RULES, max_examples=25)
    @given(
        case=cases(
            experts=experts,
            slots=slots,
            gate=False,
            rows=st.integers(0, 40) | st.sampled_from([511, 512]),
        ),
        seed=st.integers(0, 3),
        block=st.sampled_from([16, 32, 64, 128]),
        cluster=st.sampled_from([1, 1, 8]),
    )
    def every(case: Case, seed: int, block: int, cluster: int) -> None:
        how = {"seed": seed, "block": block, "cluster": cluster}
        check(functools.partial(align, cache=cache, threads=64, **how), case)

    every()


def test_aligned_without_work(cache: Path) -> None:
    """Off, or no decode row: the experts still need their order."""
    case = as_launched(
        make_case(seed=2, rows=20, experts=60, slots=4, select_top_k=1, kinds="exact")
    )
    for mode, cluster in (("on", 1), ("off", 1), ("off", 8)):
        how = {"mode": mode, "cluster": cluster}
        ids, counts = align(case, cache=cache, threads=64, seed=0, block=16, **how)
        assert_same_ids(ids, case.ids, mode)
        assert counts == (0,) * OWN_COUNTERS
