"""``spare.cuh`` on a GPU: the integers of the reference, in a graph beside the other rules, too."""

import pytest
import torch
from hypothesis import strategies as st

from sere_ray.kernel.launcher import RuleKernel
from sere_ray.kernel.limits import MAX_ROUTED_ROWS, max_aligned_rows
from sere_ray.kernel.memory import LayerTables, Settings
from tests.rules.test_sere import assert_same_ids

from .gpu_launches import BLOCKS, GPU
from .kernel_cases import check_aligned
from .margin_cases import (
    GPU_MATH,
    check_margin,
    device_layer,
    make_margin_case,
)
from .spare_cases import (
    GATED_SHAPES,
    KINDS_OF_LOSS,
    SHAPES,
    make_spare_case,
    make_statistics,
    spare_cases,
)
from .test_margin_on_gpu import (
    check_after_vllms_choice,
    check_two_ranks,
    launches_are_the_reference,
    run,
    twenty_runs_are_one,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MANY_TAUS = [0.0, 0.0005, 0.004, 0.02, 0.1, 1.0]


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_equals_reference(experts: int, slots: int, blocks: int) -> None:
    cases = spare_cases(
        experts=experts,
        slots=slots,
        rows=st.integers(0, 40) | st.integers(0, max_aligned_rows(experts, slots)),
        id_dtype=torch.int64 if experts in (33, 60) else torch.int32,
    )
    launches_are_the_reference(cases, blocks)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("experts", "slots", "groups"), GATED_SHAPES)
def test_gates_of_every_kind(experts: int, slots: int, groups: int, blocks: int) -> None:
    cases = spare_cases(experts=experts, slots=slots, groups=groups, id_dtype=torch.int32)
    launches_are_the_reference(cases, blocks, sizes=(None, 16))


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("losses", KINDS_OF_LOSS)
@pytest.mark.parametrize(("experts", "slots"), [(60, 4), (128, 8), (256, 8)])
def test_batches_of_a_server(experts: int, slots: int, losses: str, blocks: int) -> None:
    for seed, tau in enumerate(MANY_TAUS):
        case = make_spare_case(
            seed=seed,
            rows=(1, 16, 64, 200)[seed % 4],
            experts=experts,
            slots=slots,
            losses=losses,
            tau=tau,
            kinds="decode",
            floor=slots,
        )
        wanted = case.expected(GPU_MATH)
        for block in (None, 16):
            check_margin(run(case, block=block, blocks=blocks), wanted, case, f"seed {seed}")


@pytest.mark.parametrize("blocks", BLOCKS)
def test_twenty_runs_are_one(blocks: int) -> None:
    """Warps decide about experts in any order; what they decide has none."""
    case = make_spare_case(
        seed=9, rows=400, experts=128, slots=8, losses="even", tau=0.5, kinds="decode", limit=1.0
    )
    twenty_runs_are_one(case, blocks)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(
    ("experts", "slots", "dtype"), [(128, 8, torch.bfloat16), (64, 6, torch.float32)]
)
def test_vllms_choice_then_the_rule(
    experts: int, slots: int, dtype: torch.dtype, blocks: int
) -> None:
    kernel = RuleKernel(experts, slots, torch.int32, logit_dtype=dtype)
    for seed in range(30):
        case = make_spare_case(
            seed=seed,
            rows=(1, 2, 7, 16, 33, MAX_ROUTED_ROWS)[seed % 6],
            experts=experts,
            slots=slots,
            dtype=dtype,
            losses=KINDS_OF_LOSS[seed % len(KINDS_OF_LOSS)],
            tau=MANY_TAUS[seed % len(MANY_TAUS)],
        )
        check_after_vllms_choice(
            kernel, case, blocks, renormalize=seed % 3 == 0, note=f"seed {seed}"
        )


def test_two_ranks_keep_one_set() -> None:
    kernel = RuleKernel(128, 8, torch.int32)
    for seed in range(30):
        case = make_spare_case(
            seed=seed,
            rows=(1, 5, 64, 200)[seed % 4],
            experts=128,
            slots=8,
            losses=KINDS_OF_LOSS[seed % len(KINDS_OF_LOSS)],
            tau=MANY_TAUS[seed % len(MANY_TAUS)],
        )
        check_two_ranks(kernel, case, seed % 5 / 4)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_captured_graph_follows_the_rule(blocks: int) -> None:
    """One capture; then margin and spare take turns, with settings and steps of their own."""
    statistics = make_statistics(128, "even", 0)
    shape = {"rows": 48, "experts": 128, "slots": 8, "shuffled": False}
    base = make_margin_case(seed=1, tau=0.0, **shape)
    settings_ = Settings(GPU, layers=2)
    tables = LayerTables.build(torch.eye(128), GPU, statistics)
    layer = device_layer(base, GPU)._replace(tables=tables, settings=settings_.buffer[1])
    kernel = RuleKernel(128, 8, torch.int32)
    kernel.load(GPU, ("reroute",))
    given = [tensor.to(GPU) for tensor in (base.ids, base.weights, base.logits)]
    ids, weights = given[0].clone(), given[1].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids.copy_(given[0])
        weights.copy_(given[1])
        kernel.reroute(ids, ids, weights, layer, logits=given[2], blocks=blocks)
    for seed in range(40):
        case = make_margin_case(seed=seed, tau=MANY_TAUS[seed % len(MANY_TAUS)], **shape)
        if seed % 2:
            case = case._replace(rule="spare", statistics=statistics)
        settings_.write(case.policy(), top_k=8, num_experts=128, statistics=[statistics] * 2)
        for to, source in zip(given, (case.ids, case.weights, case.logits), strict=True):
            to.copy_(source)
        layer.step.write(case.kinds.numpy(), counter_row=1)
        layer.counters.zero_()
        graph.replay()
        wanted = case.expected(GPU_MATH)
        assert_same_ids(ids.cpu(), wanted[0], f"seed {seed}")
        torch.testing.assert_close(weights.cpu(), wanted[1])
        assert tuple(layer.counters[1].tolist()) == wanted[2]


@pytest.mark.parametrize("blocks", BLOCKS)
def test_sorted_slots_of_a_captured_graph(blocks: int) -> None:
    case = make_spare_case(seed=2, rows=32, experts=128, slots=8, losses="similar", tau=0.1)
    kernel, layer = RuleKernel(128, 8, torch.int32), device_layer(case, GPU)
    kernel.load(GPU, ("reroute_and_align",))
    given = [tensor.to(GPU) for tensor in (case.ids, case.weights, case.logits)]
    ids, weights = given[0].clone(), given[1].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids.copy_(given[0])
        weights.copy_(given[1])
        aligned = kernel.reroute_and_align(
            ids, ids, weights, layer, logits=given[2], block_size=16, blocks=blocks
        )
    layer.counters.zero_()
    graph.replay()
    found = ids.cpu(), weights.cpu(), tuple(layer.counters[1].tolist())
    check_margin(found, case.expected(GPU_MATH), case)
    check_aligned(found[0], aligned, 16, 128)
