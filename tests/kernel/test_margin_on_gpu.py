"""``margin.cuh`` on a GPU: the integers of the reference, in a graph beside sere, too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_ray.kernel.across_ranks import ask_of_ranks, reroute_by_asked
from sere_ray.kernel.launcher import RuleKernel
from sere_ray.kernel.limits import MAX_ROUTED_ROWS, max_aligned_rows
from sere_ray.kernel.memory import LayerTables, Settings
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import sere
from tests.rules.test_sere import RULES, assert_same_ids

from .gpu_launches import BLOCKS, GPU, route, vllm_top_k
from .kernel_cases import check_aligned
from .margin_cases import (
    GATED_SHAPES,
    GPU_MATH,
    KNOBS,
    SHAPES,
    Found,
    MarginCase,
    balanced,
    check_margin,
    check_ranks,
    device_layer,
    kernel_of,
    make_margin_case,
    margin_cases,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def run(case: MarginCase, *, block: int | None = None, mode: str = "on", blocks: int = 1) -> Found:
    kernel = kernel_of(case)
    layer = device_layer(case, GPU, mode)
    ids, weights, logits = case.ids.to(GPU), case.weights.to(GPU), case.logits.to(GPU)
    if block:
        aligned = kernel.reroute_and_align(
            ids, ids, weights, layer, block_size=block, logits=logits, blocks=blocks
        )
        check_aligned(ids.cpu(), aligned, block, case.logits.shape[1])
    else:
        kernel.reroute(ids, ids, weights, layer, logits=logits, blocks=blocks)
    assert not layer.counters[0].any()
    return ids.cpu(), weights.cpu(), tuple(layer.counters[1].tolist())


def launches_are_the_reference(
    cases: st.SearchStrategy[MarginCase],
    blocks: int,
    examples: int = 30,
    sizes: tuple[int | None, ...] = (None, 16, 64),
) -> None:
    """With and without sorting, for GEMM blocks of some sizes."""

    @settings(RULES, max_examples=examples)
    @given(case=cases, block=st.sampled_from(sizes))
    def every(case: MarginCase, block: int | None) -> None:
        check_margin(run(case, block=block, blocks=blocks), case.expected(GPU_MATH), case)

    every()


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_equals_reference(experts: int, slots: int, blocks: int) -> None:
    cases = margin_cases(
        experts=experts,
        slots=slots,
        rows=st.integers(0, 40) | st.integers(0, max_aligned_rows(experts, slots)),
        id_dtype=torch.int64 if experts in (33, 60) else torch.int32,
    )
    launches_are_the_reference(cases, blocks)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("experts", "slots", "groups"), GATED_SHAPES)
def test_gates_of_every_kind(experts: int, slots: int, groups: int, blocks: int) -> None:
    cases = margin_cases(
        experts=experts,
        slots=slots,
        groups=groups,
        rows=st.integers(0, 40) | st.integers(0, max_aligned_rows(experts, slots)),
        id_dtype=torch.int32,
    )
    launches_are_the_reference(cases, blocks, examples=40, sizes=(None, 16))


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("rows", [0, 1, 33, 128, 200])
@pytest.mark.parametrize(("experts", "slots"), [(60, 4), (64, 6), (128, 8), (256, 8)])
def test_batches_of_a_server(experts: int, slots: int, rows: int, blocks: int) -> None:
    for seed, tau in enumerate(KNOBS["tau"]):
        case = make_margin_case(
            seed=seed, rows=rows, experts=experts, slots=slots, tau=tau, kinds="decode", floor=slots
        )
        wanted = case.expected(GPU_MATH)
        for block in (None, 16):
            check_margin(run(case, block=block, blocks=blocks), wanted, case, f"seed {seed}")


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("rows", [513, 4096, 131_072])
def test_many_rows(rows: int, blocks: int) -> None:
    case = make_margin_case(seed=rows, rows=rows, experts=60, slots=4, tau=1.0, floor=4)
    check_margin(run(case, blocks=blocks), case.expected(GPU_MATH), case)


def twenty_runs_are_one(case: MarginCase, blocks: int) -> None:
    first = run(case, blocks=blocks)
    for _ in range(20):
        again = run(case, blocks=blocks)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert first[2] == again[2]


@pytest.mark.parametrize("blocks", BLOCKS)
def test_twenty_runs_are_one(blocks: int) -> None:
    case = make_margin_case(seed=9, rows=400, experts=128, slots=8, tau=0.05, kinds="decode")
    twenty_runs_are_one(case, blocks)


def check_after_vllms_choice(
    kernel: RuleKernel, case: MarginCase, blocks: int, *, renormalize: bool, note: str
) -> None:
    """The gate's top-k in the launch: vLLM's choice of the same logits, then the rule."""
    logits, padding = case.logits.to(GPU), (case.ids < 0).any(dim=1).to(GPU)
    weights, ids = vllm_top_k(logits, kernel.top_k, renormalize, padding)
    case = case._replace(ids=ids.cpu(), weights=weights.cpu())
    layer = device_layer(case, GPU)
    new_ids, new_weights = route(
        kernel, logits, layer, padding=padding, renormalize=renormalize, blocks=blocks
    )
    found = new_ids.cpu(), new_weights.cpu(), tuple(layer.counters[1].tolist())
    check_margin(found, case.expected(GPU_MATH), case, note)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(
    ("experts", "slots", "dtype"),
    [(128, 8, torch.bfloat16), (64, 6, torch.float32), (256, 8, torch.bfloat16)],
)
def test_vllms_choice_then_the_rule(
    experts: int, slots: int, dtype: torch.dtype, blocks: int
) -> None:
    kernel = RuleKernel(experts, slots, torch.int32, logit_dtype=dtype)
    for seed in range(60):
        case = make_margin_case(
            seed=seed,
            rows=(1, 2, 7, 16, 33, MAX_ROUTED_ROWS)[seed % 6],
            experts=experts,
            slots=slots,
            dtype=dtype,
            tied=seed % 4 == 3,
            floor=(0, slots)[seed % 2],
            **{name: values[seed % len(values)] for name, values in KNOBS.items()},
        )
        check_after_vllms_choice(
            kernel, case, blocks, renormalize=seed % 3 == 0, note=f"seed {seed}"
        )


def check_two_ranks(kernel: RuleKernel, case: MarginCase, split: float) -> None:
    """Two launches of each of two ranks, against the rule on the rows of both."""
    ranks = case.split(split, GPU)
    logits = [of_rank.case.logits.to(GPU) for of_rank in ranks]
    asked = torch.full((2, kernel.num_experts), -7, device=GPU)
    for (_, ids, weights, layer), of_rank, own in zip(ranks, logits, asked, strict=True):
        ask_of_ranks(kernel, ids, weights, layer, of_rank, own)
    owner = None if case.owner is None else case.owner.to(GPU, torch.uint8)
    for (_, ids, weights, layer), of_rank in zip(ranks, logits, strict=True):
        reroute_by_asked(kernel, ids, weights, layer, of_rank, asked.sum(dim=0), owner)
    check_ranks(ranks, case.expected(GPU_MATH), case)


def test_two_ranks_keep_one_set() -> None:
    kernel = RuleKernel(128, 8, torch.int32)
    for seed in range(40):
        knobs = {name: values[seed % len(values)] for name, values in KNOBS.items()}
        case = make_margin_case(
            seed=seed, rows=(1, 5, 64, 200)[seed % 4], experts=128, slots=8, floor=8, **knobs
        )
        check_two_ranks(kernel, case, seed % 5 / 4)
        check_two_ranks(kernel, balanced(case, 1 + seed % 16), seed % 5 / 4)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_captured_graph_follows_the_rule(blocks: int) -> None:
    """One capture; then sere and margin take turns, with settings and steps of their own."""
    base = make_margin_case(seed=1, rows=48, experts=128, slots=8, tau=0.0, shuffled=False)
    settings_ = Settings(GPU, layers=2)
    similarity = torch.rand((128, 128), generator=torch.Generator().manual_seed(0))
    layer = device_layer(base, GPU)._replace(
        tables=LayerTables.build(similarity, GPU), settings=settings_.buffer[1]
    )
    kernel = RuleKernel(128, 8, torch.int32)
    kernel.load(GPU, ("reroute", "reroute_and_align"))
    ids, weights, logits = base.ids.to(GPU), base.weights.to(GPU), base.logits.to(GPU)
    both = [(ids.clone(), weights.clone()) for _ in range(2)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for new_ids, new_weights in both:
            new_ids.copy_(ids)
            new_weights.copy_(weights)
        kernel.reroute(both[0][0], *both[0], layer, logits=logits, blocks=blocks)
        aligned = kernel.reroute_and_align(
            both[1][0], *both[1], layer, logits=logits, block_size=16, blocks=blocks
        )
    for seed in range(40):
        rows = 48 if seed % 3 else 31  # the rest is graph padding
        knobs = {name: values[seed % len(values)] for name, values in KNOBS.items()}
        case = make_margin_case(
            seed=seed, rows=rows, experts=128, slots=8, shuffled=False, floor=8, **knobs
        )
        by_sere = seed % 2 == 0
        bound = case.policy()
        if by_sere:
            bound = BoundPolicy(
                mode="on", select_top_k=1 + seed % 7, threshold=None, min_primary_experts=8
            )
        settings_.write(bound, top_k=8, num_experts=128)
        ids.fill_(-1)
        for to, source in ((ids, case.ids), (weights, case.weights), (logits, case.logits)):
            to[:rows].copy_(source)
        layer.step.write(case.kinds.numpy(), counter_row=seed % 2)
        layer.counters.zero_()
        graph.replay()
        wanted_ids, wanted_weights, counts = case.expected(GPU_MATH)
        if by_sere:
            wanted_weights = case.weights
            wanted_ids = sere.reroute(
                case.ids,
                case.weights,
                similarity,
                row_kind=case.kinds,
                select_top_k=1 + seed % 7,
                min_primary_experts=8,
            )
        for new_ids, new_weights in both:
            assert_same_ids(new_ids[:rows].cpu(), wanted_ids, f"seed {seed}")
            torch.testing.assert_close(new_weights[:rows].cpu(), wanted_weights)
            assert bool((new_ids[rows:] == -1).all())
        if not by_sere:
            assert layer.counters[1].tolist() == [2 * number for number in counts]
        check_aligned(both[1][0].cpu(), aligned, 16, 128)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("experts", "slots"), [(64, 6), (128, 8), (256, 8)])
def test_captured_choice_follows_the_rule(experts: int, slots: int, blocks: int) -> None:
    """The gate's choice in the launch, too: one capture, then the rules take turns."""
    base = make_margin_case(
        seed=0, rows=33, experts=experts, slots=slots, tau=0.0, kinds="decode", shuffled=False
    )
    settings_ = Settings(GPU, layers=2)
    similarity = torch.rand((experts, experts), generator=torch.Generator().manual_seed(0))
    layer = device_layer(base, GPU)._replace(
        tables=LayerTables.build(similarity, GPU), settings=settings_.buffer[1]
    )
    kernel = RuleKernel(experts, slots, torch.int32)
    kernel.load(GPU, ("route_and_align",))
    logits, ids, weights = base.logits.to(GPU), base.ids.to(GPU), base.weights.to(GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        aligned = kernel.route_and_align(
            logits,
            ids,
            weights,
            layer,
            is_padding=None,
            renormalize=False,
            block_size=16,
            blocks=blocks,
        )
    for seed in range(20):
        knobs = {name: values[seed % len(values)] for name, values in KNOBS.items()}
        case = make_margin_case(
            seed=seed,
            rows=33,
            experts=experts,
            slots=slots,
            kinds="decode",
            shuffled=False,
            **knobs,
        )
        by_sere, bound = seed % 2 == 0, case.policy()
        if by_sere:
            bound = BoundPolicy(
                mode="on", select_top_k=1 + seed % 3, threshold=None, min_primary_experts=0
            )
        settings_.write(bound, top_k=slots, num_experts=experts)
        layer.step.write(case.kinds.numpy(), counter_row=1)
        logits.copy_(case.logits)
        graph.replay()
        wanted = case.expected(GPU_MATH)[0]
        if by_sere:
            wanted = sere.reroute(
                case.ids, case.weights, similarity, row_kind=case.kinds, select_top_k=1 + seed % 3
            )
        assert_same_ids(ids.cpu(), wanted, f"seed {seed}")
        check_aligned(ids.cpu(), aligned, 16, experts)
