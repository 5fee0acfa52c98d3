"""``across_ranks.cu``, run on the CPU: rows of two ranks against the reference on all."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_ray.kernel.memory import NUM_COUNTERS
from sere_ray.rules import PADDING, REROUTABLE, sere
from sere_ray.rules.common import named_by
from tests.rules.test_sere import RULES, Case, assert_same_ids, cases, make_case

from .emulator import COMPILER, KernelError, launch
from .kernel_cases import (
    as_launched,
    busiest,
    check_local_alignment,
    check_split,
    device_layer,
    empty_alignment,
    expected,
    kernel_of,
    library,
    own_slots,
    peers_on,
    rule_arguments,
    split_up,
    two_ranks,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernel with")

CPU = torch.device("cpu")
SHAPES = [(128, 8), (60, 4), (300, 5), (9, 3)]


def run(name, case: Case, ids, layer, *others, cache: Path, seed: int, threads: int = 64):
    kernel = kernel_of(case)
    launch(
        library(kernel, name, threads, cache),
        name,
        *rule_arguments(ids, ids, case.weights, layer),
        *others,
        threads=threads,
        seed=seed,
    )


def gathered(case: Case, own: range, placement, *, cache, seed, block, mode="on", threads=64):
    """What a rank does with the gathered rows: new ids, counters, sorted slots if asked for."""
    kernel = kernel_of(case)
    ids = case.ids.clone()
    counters = torch.zeros((2, NUM_COUNTERS), dtype=torch.int64)
    layer = device_layer(case, CPU, mode, counters=counters, own=own)
    aligned, sorted_arguments = (
        empty_alignment(kernel, ids, block, -(-case.experts // 2)) if block else (None, [])
    )
    name = "reroute_gathered_and_align" if block else "reroute_gathered"
    others = [*placement, *sorted_arguments]
    run(name, case, ids, layer, *others, cache=cache, seed=seed, threads=threads)
    assert counters[0].tolist() == [0] * NUM_COUNTERS
    return ids, counters[1].tolist(), aligned


@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_every_rank_derives_the_ids_of_the_reference(experts, slots, cache):
    @settings(RULES, max_examples=25)
    @given(
        case=cases(
            experts=experts,
            slots=slots,
            gate=False,
            rows=st.integers(0, 40) | st.sampled_from([511, 512]),
        ),
        split=st.floats(0, 1),
        round_robin=st.booleans(),
        seed=st.integers(0, 3),
        block=st.sampled_from([None, 16, 64]),
    )
    def every(case: Case, split: float, round_robin: bool, seed: int, block: int | None) -> None:
        check_ranks(as_launched(case), split, round_robin, cache=cache, seed=seed, block=block)

    every()


def check_ranks(case: Case, split: float, round_robin: bool, *, block, **options):
    new, counts = expected(case)
    for own, placement in two_ranks(case, split, round_robin):
        ids, counters, aligned = gathered(case, own, placement, block=block, **options)
        assert_same_ids(ids, new, "kernel")
        assert counters[:2] == list(counts[:2])
        assert counters[3] == counts[3]
        assert counters[2] == own_slots(case, new, own)
        assert counters[6:] == (busiest(case, new, placement) if counts[0] else [0, 0])
        if aligned:
            check_local_alignment(ids, aligned, block, placement.local_ids)


@pytest.mark.parametrize("threads", [512, 1024])
def test_block_sizes_as_launched(threads, cache):
    for rows in (0, 1, 32, 130):
        for kinds in ("decode", "mixed", "padding", "exact"):
            case = make_case(
                seed=rows, rows=rows, experts=128, slots=8, select_top_k=1, kinds=kinds, floor=8
            )
            for block in (None, 16):
                options = {"cache": cache, "seed": 1, "block": block, "threads": threads}
                check_ranks(as_launched(case), 0.5, False, **options)


def test_identity_sorts_and_counts_what_is_read(cache):
    """The launch of a rank whose rows were re-routed before they were gathered."""
    case = as_launched(
        make_case(seed=3, rows=20, experts=60, slots=4, select_top_k=4, kinds="mixed")
    )
    own, placement = two_ranks(case, 0.5, False)[0]
    options = {"cache": cache, "seed": 0, "block": 16}
    ids, counters, aligned = gathered(case, own, placement, mode="observe", **options)
    assert torch.equal(ids, case.ids)
    assert counters[0] == counters[1] == expected(case)[1][0]
    assert counters[2] == 0
    check_local_alignment(ids, aligned, 16, placement.local_ids)
    ids, counters, aligned = gathered(case, own, placement, mode="off", **options)
    assert torch.equal(ids, case.ids)
    assert counters == [0] * NUM_COUNTERS
    check_local_alignment(ids, aligned, 16, placement.local_ids)


@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_exchanged_slot_orders_give_the_ids_of_the_reference(experts, slots, cache):
    @settings(RULES, max_examples=25)
    @given(
        case=cases(experts=experts, slots=slots, gate=False, rows=st.integers(0, 40)),
        split=st.floats(0, 1),
        seed=st.integers(0, 3),
    )
    def every(case: Case, split: float, seed: int) -> None:
        check_exchange(as_launched(case), split, cache=cache, seed=seed)

    every()


def check_exchange(case: Case, split: float, **options):
    reroutable = int((case.kinds == REROUTABLE).sum())
    owned, vectors = [own for own, _ in two_ranks(case, split, False)], []
    parts, layers, ids, _ = split_up(case, owned, CPU)
    for part, layer, of_rank in zip(parts, layers, ids, strict=True):
        orders = torch.full((case.experts,), 77, dtype=torch.uint8)
        run("lowest_slot_orders", part, of_rank, layer, orders, **options)
        assert torch.equal(of_rank, part.ids)
        reference = sere.slot_order_bytes(part.ids, part.weights, case.experts, part.kinds)
        assert torch.equal(orders, reference if reroutable else torch.full_like(orders, 255))
        vectors.append(orders)
    lowest = torch.minimum(*vectors)
    told = []
    for part, layer, of_rank in zip(parts, layers, ids, strict=True):
        told.append(torch.full((case.experts,), 7, dtype=torch.uint8))
        run("reroute_by_slot_orders", part, of_rank, layer, lowest, told[-1], **options)
    check_split(case, owned, ids, layers)
    check_told(case, ids, told)


def check_told(case: Case, ids, told):
    """Every rank knows what all of them read; nothing in a step without a row to re-route."""
    kinds, after = case.kinds != PADDING, torch.cat(ids)
    read = named_by(after, kinds & (REROUTABLE in case.kinds), case.experts)
    for of_rank in told:
        assert torch.equal(of_rank.bool(), read)


def library_of(peers, part: Case, cache, threads=64):
    """Compiled, if it was not, which takes longer than ranks wait for each other."""
    kernel = kernel_of(part)
    return library(kernel, "reroute_with_peers", threads, cache, peers.rank)


def with_peers(peers, part: Case, layer, ids, *, cache, seed, threads=64, told=None):
    """A rank's launch of `reroute_with_peers`; returns when the others have launched theirs."""
    launch(
        library_of(peers, part, cache, threads),
        "reroute_with_peers",
        *rule_arguments(ids, ids, part.weights, layer),
        peers.inboxes,
        peers.number,
        peers.rank,
        len(peers.inboxes),
        peers.patience_ns,
        None if told is None else told[peers.rank],
        threads=threads,
        seed=seed,
    )


@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_ranks_that_reach_each_other_need_one_launch(experts, slots, cache):
    """Launch after launch over the same inboxes; some in which the rule has nothing to do."""
    ranks = peers_on(CPU, experts, 2)

    @settings(RULES, max_examples=25)
    @given(
        case=cases(experts=experts, slots=slots, gate=False, rows=st.integers(0, 40)),
        split=st.floats(0, 1),
        seed=st.integers(0, 3),
    )
    def every(case: Case, split: float, seed: int) -> None:
        owned = [own for own, _ in two_ranks(case, split, False)]
        check_peers(ranks, as_launched(case), owned, cache=cache, seed=seed)

    every()
    assert ranks[0].number == ranks[1].number > 0


def test_five_ranks_one_of_them_without_rows(cache):
    ranks = peers_on(CPU, 60, 5)
    for seed in range(6):
        case = make_case(seed=seed, rows=22, experts=60, slots=4, select_top_k=1, kinds="mixed")
        owned = [range(3), range(3, 3), range(3, 12), range(12, 13), range(13, 22)]
        check_peers(ranks, as_launched(case), owned, cache=cache, seed=seed % 4)
    assert [int(peers.number) for peers in ranks] == [6] * 5


def check_peers(ranks, case: Case, owned: list[range], **options):
    parts, layers, ids, _ = split_up(case, owned, CPU)
    for peers in ranks:
        library_of(peers, case, options["cache"])
    told = [torch.full((case.experts,), 7, dtype=torch.uint8) for _ in ranks]
    with ThreadPoolExecutor(len(ranks)) as pool:
        launches = [
            pool.submit(with_peers, *of_rank, **options, told=told)
            for of_rank in zip(ranks, parts, layers, ids, strict=True)
        ]
        for one in launches:
            one.result()
    check_split(case, owned, ids, layers)
    check_told(case, ids, told)


def test_a_rank_that_never_comes_is_given_up(cache):
    case = as_launched(make_case(seed=1, rows=4, experts=9, slots=3, select_top_k=1))
    (peers, _) = peers_on(CPU, 9, 2)
    impatient = replace(peers, patience_ns=10**7)
    with pytest.raises(KernelError, match="__trap"):
        with_peers(impatient, case, device_layer(case, CPU), case.ids.clone(), cache=cache, seed=0)
