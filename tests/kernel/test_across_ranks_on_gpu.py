"""``kernels/cuda/across_ranks.cu`` on one GPU: what two ranks derive from the same rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_ray.kernel import across_ranks
from sere_ray.kernel.across_ranks import Placement
from sere_ray.kernel.memory import NUM_COUNTERS, StepInput
from sere_ray.rules import REROUTABLE, sere
from tests.rules.test_sere import RULES, Case, assert_same_ids, cases, make_case

from .kernel_cases import (
    as_launched,
    busiest,
    check_local_alignment,
    check_split,
    device_layer,
    expected,
    kernel_of,
    own_slots,
    peers_on,
    split_up,
    two_ranks,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda", 0)
SHAPES = [(128, 8), (60, 4), (300, 5), (512, 10)]


def on_gpu(placement: Placement) -> Placement:
    return Placement(placement.local_ids.to(GPU), placement.owner.to(GPU), placement.num_ranks)


def check_gathered(case: Case, split: float, round_robin: bool, block: int | None) -> None:
    new, counts = expected(case)
    for own, placement in two_ranks(case, split, round_robin):
        counters = torch.zeros((2, NUM_COUNTERS), dtype=torch.int64, device=GPU)
        layer = device_layer(case, GPU, counters=counters, own=own)
        ids, weights = case.ids.to(GPU), case.weights.to(GPU)
        arguments = (kernel_of(case), ids, weights, layer, on_gpu(placement))
        if block:
            aligned = across_ranks.reroute_gathered_and_align(*arguments, block_size=block)
            check_local_alignment(ids, aligned, block, placement.local_ids)
        else:
            across_ranks.reroute_gathered(*arguments)
        assert_same_ids(ids.cpu(), new, "kernel")
        assert not counters[0].any()
        before, after, slots, critical, _, _, *most = counters[1].tolist()
        assert (before, after, critical) == (counts[0], counts[1], counts[3])
        assert slots == own_slots(case, new, own)
        assert most == (busiest(case, new, placement) if counts[0] else [0, 0])


@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_every_rank_derives_the_ids_of_the_reference(experts, slots):
    @settings(RULES, max_examples=60)
    @given(
        case=cases(
            experts=experts,
            slots=slots,
            gate=False,
            rows=st.integers(0, 40) | st.integers(0, 512),
        ),
        split=st.floats(0, 1),
        round_robin=st.booleans(),
        block=st.sampled_from([None, 16, 64, 128]),
    )
    def every(case: Case, split: float, round_robin: bool, block: int | None) -> None:
        check_gathered(as_launched(case), split, round_robin, block)

    every()


@pytest.mark.parametrize("rows", [513, 8192])
def test_many_rows(rows):
    case = make_case(
        seed=rows, rows=rows, experts=128, slots=8, select_top_k=1, gate=True, kinds="few exact"
    )
    check_gathered(as_launched(case), 0.5, False, None)


def exchanged(case: Case, split: float) -> None:
    owned = [own for own, _ in two_ranks(case, split, False)]
    parts, layers, ids, weights = split_up(case, owned, GPU)
    reroutable, vectors = int((case.kinds == REROUTABLE).sum()), []
    for part, layer, *of_rank in zip(parts, layers, ids, weights, strict=True):
        orders = torch.full((case.experts,), 77, dtype=torch.uint8, device=GPU)
        across_ranks.lowest_slot_orders(kernel_of(case), *of_rank, layer, orders)
        reference = sere.slot_order_bytes(part.ids, part.weights, case.experts, part.kinds)
        assert torch.equal(
            orders.cpu(), reference if reroutable else torch.full_like(reference, 255)
        )
        vectors.append(orders)
    lowest = torch.minimum(*vectors)
    for of_rank in zip(ids, weights, layers, strict=True):
        across_ranks.reroute_by_slot_orders(kernel_of(case), *of_rank, lowest)
    check_split(case, owned, ids, layers)


@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_exchanged_slot_orders_give_the_ids_of_the_reference(experts, slots):
    @settings(RULES, max_examples=60)
    @given(
        case=cases(experts=experts, slots=slots, gate=False, rows=st.integers(0, 200)),
        split=st.floats(0, 1),
    )
    def every(case: Case, split: float) -> None:
        exchanged(as_launched(case), split)

    every()


@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_ranks_that_reach_each_other_need_one_launch(experts, slots):
    """Two ranks on one GPU, a stream each: their blocks run at the same time."""
    ranks = peers_on(GPU, experts, 2)
    streams = [torch.cuda.Stream(GPU) for _ in ranks]

    @settings(RULES, max_examples=60)
    @given(
        case=cases(experts=experts, slots=slots, gate=False, rows=st.integers(0, 200)),
        split=st.floats(0, 1),
    )
    def every(case: Case, split: float) -> None:
        check_peers(ranks, streams, as_launched(case), split)

    every()
    assert int(ranks[0].number) == int(ranks[1].number) > 0


def check_peers(ranks, streams, case: Case, split: float) -> None:
    owned = [own for own, _ in two_ranks(case, split, False)]
    _, layers, ids, weights = split_up(case, owned, GPU)
    (alone,) = peers_on(GPU, case.experts, 1)
    for of_ids, *of_rank in zip(ids, weights, layers, strict=True):
        # A kernel's first launch may wait for the GPU to be idle; this one waits for nobody.
        across_ranks.reroute_with_peers(kernel_of(case), of_ids.clone(), *of_rank, alone)
    for layer in layers:
        layer.counters.zero_()
    torch.cuda.synchronize()
    for stream, *of_rank in zip(streams, ids, weights, layers, ranks, strict=True):
        with torch.cuda.stream(stream):
            across_ranks.reroute_with_peers(kernel_of(case), *of_rank)
    torch.cuda.synchronize()
    check_split(case, owned, ids, layers)


def test_captured_graph_follows_row_kinds():
    """A graph of the gathered launch, replayed for passes with other rows of either rank."""
    case = as_launched(
        make_case(seed=4, rows=32, experts=128, slots=8, select_top_k=1, gate=True, kinds="decode")
    )
    _, placement = two_ranks(case, 0.5, False)[0]
    placement = on_gpu(placement)
    kernel, layer = kernel_of(case), device_layer(case, GPU)
    counters = torch.zeros((2, NUM_COUNTERS), dtype=torch.int64, device=GPU)
    layer = layer._replace(counters=counters, step=StepInput(32, GPU))
    source, weights = case.ids.to(GPU), case.weights.to(GPU)
    ids = source.clone()
    arguments = (kernel, ids, weights, layer, placement)
    across_ranks.reroute_gathered_and_align(*arguments, block_size=16)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids.copy_(source)
        aligned = across_ranks.reroute_gathered_and_align(*arguments, block_size=16)
    for first, second in ((16, 16), (3, 9), (0, 5), (0, 0)):
        kinds = torch.zeros(32, dtype=torch.int8)
        kinds[:first] = kinds[16 : 16 + second] = REROUTABLE
        layer.step.write(kinds.numpy(), 0, own=range(16))
        graph.replay()
        new = sere.reroute(
            case.ids,
            case.weights,
            case.similarity,
            row_kind=kinds,
            select_top_k=1,
            threshold=case.threshold,
            min_primary_experts=case.floor,
        )
        assert_same_ids(ids.cpu(), new if first + second else case.ids, "kernel")
        check_local_alignment(ids, aligned, 16, placement.local_ids)
