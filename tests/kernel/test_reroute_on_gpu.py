"""``kernels/cuda/reroute.cu`` on a GPU: the integers of the reference, in graphs too."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_ray.kernel.memory import OWN_COUNTERS, STEP, Settings, StepInput
from sere_ray.rules import EXACT, REROUTABLE
from tests.rules.test_sere import RULES, Case, assert_same_ids, cases, make_case

from .kernel_cases import (
    SHAPES,
    as_launched,
    check,
    check_aligned,
    device_layer,
    expected,
    kernel_of,
    odd_cases,
    policy,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda", 0)


def run(case: Case, *, inplace: bool, mode: str = "on"):
    counters = torch.zeros((2, 3, OWN_COUNTERS), dtype=torch.int64, device=GPU)
    ids = case.ids.to(GPU)
    new_ids = ids if inplace else torch.full_like(ids, -7)
    kernel_of(case).reroute(
        ids,
        new_ids,
        case.weights.to(GPU),
        device_layer(case, GPU, mode, counters[:, 1]),
    )
    counters = counters.cpu()
    assert not counters[0].any()
    assert not counters[1, ::2].any()
    if not inplace:
        assert torch.equal(ids.cpu(), case.ids)
    return new_ids.cpu(), tuple(counters[1, 1].tolist())


def align(case: Case, *, block: int, mode: str = "on"):
    layer = device_layer(case, GPU, mode)
    ids = case.ids.to(GPU)
    aligned = kernel_of(case).reroute_and_align(
        ids,
        ids,
        case.weights.to(GPU),
        layer,
        block_size=block,
    )
    check_aligned(ids.cpu(), aligned, block, case.experts)
    return ids.cpu(), tuple(layer.counters.cpu()[1].tolist())


@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_equals_reference(experts: int, slots: int) -> None:
    @settings(RULES, max_examples=150)
    @given(case=cases(experts=experts, slots=slots, gate=False), inplace=st.booleans())
    def every(case: Case, inplace: bool) -> None:
        check(functools.partial(run, inplace=inplace), case)

    every()
    for case in odd_cases(experts, slots):
        check(functools.partial(run, inplace=True), case)


@settings(RULES, max_examples=25)
@given(case=cases())
def test_any_shape(case: Case) -> None:
    check(functools.partial(run, inplace=True), case)


@pytest.mark.parametrize("rows", [511, 512, 513, 4096, 131_072])
def test_many_rows(rows: int) -> None:
    case = make_case(
        seed=rows, rows=rows, experts=128, slots=8, select_top_k=1, gate=True, kinds="few exact"
    )
    check(functools.partial(run, inplace=True), case)
    sparse = make_case(seed=1, rows=rows, experts=512, slots=4, select_top_k=2, kinds="decode")
    check(functools.partial(run, inplace=False), sparse)


@pytest.mark.parametrize(("experts", "slots"), [(128, 8), (60, 4), (64, 6), (300, 5)])
def test_aligned(experts: int, slots: int) -> None:
    @settings(RULES, max_examples=100)
    @given(
        case=cases(
            experts=experts,
            slots=slots,
            gate=False,
            rows=st.integers(0, 40) | st.integers(0, 512),
        ),
        block=st.sampled_from([16, 32, 64, 128]),
    )
    def every(case: Case, block: int) -> None:
        check(functools.partial(align, block=block), case)

    every()


def test_observe_and_off() -> None:
    case = as_launched(
        make_case(seed=2, rows=20, experts=60, slots=4, select_top_k=1, kinds="mixed", gate=True)
    )
    ids, counts = run(case, inplace=True, mode="observe")
    assert_same_ids(ids, case.ids, "observe")
    assert counts == expected(case)[1]
    ids, counts = run(case, inplace=False, mode="off")
    assert_same_ids(ids, case.ids, "off")
    assert counts == (0,) * OWN_COUNTERS


def test_twenty_runs_are_one(  # deterministic: no order of threads shows
) -> None:
    case = as_launched(
        make_case(seed=9, rows=400, experts=128, slots=8, select_top_k=2, gate=True, floor=8)
    )
    first = run(case, inplace=True)
    for _ in range(20):
        again = run(case, inplace=True)
        assert torch.equal(first[0], again[0])
        assert first[1] == again[1]


def test_captured_graph_follows_settings_and_row_kinds() -> None:
    """One capture; then every setting and step is read from device memory."""
    base = as_launched(
        make_case(seed=1, rows=48, experts=128, slots=8, select_top_k=1, gate=True, kinds="none")
    )
    settings_ = Settings(GPU)
    layer = device_layer(base, GPU)._replace(settings=settings_.buffer[0])
    tables, _, step, counters, _ = layer
    settings_.write(policy(base), top_k=8, num_experts=128)
    step.clear()
    kernel = kernel_of(base)
    ids, weights = base.ids.to(GPU), base.weights.to(GPU)
    new_ids, sorted_ids = torch.empty_like(ids), ids.clone()
    kernel.load(GPU, ("reroute", "reroute_and_align"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.reroute(ids, new_ids, weights, layer)
        sorted_ids.copy_(ids)
        aligned = kernel.reroute_and_align(sorted_ids, sorted_ids, weights, layer, block_size=16)
    graph.replay()
    assert torch.equal(new_ids, ids)  # no step has begun
    for seed in range(30):
        case = as_launched(
            make_case(
                seed=seed,
                rows=48 if seed % 3 else 31,  # the rest is graph padding
                experts=128,
                slots=8,
                select_top_k=seed % 10,
                floor=(0, 8, 40)[seed % 3],
                threshold=("none", "entry", "zero")[seed % 3],
                kinds=("none", "mixed", "exact", "padding")[seed % 4],
                gate=True,
                tied=bool(seed % 2),
            )
        )
        rows = case.ids.shape[0]
        ids.fill_(-1)
        ids[:rows].copy_(case.ids)
        weights[:rows].copy_(case.weights)
        settings_.write(policy(case), top_k=8, num_experts=128)
        step.write(case.kinds.numpy(), counter_row=seed % 2)
        tables.similarity.copy_(case.similarity)
        tables.neighbours.copy_(type(tables).build(case.similarity, GPU).neighbours)
        counters.zero_()
        graph.replay()
        wanted, counts = expected(case)
        assert_same_ids(new_ids[:rows].cpu(), wanted, f"seed {seed}")
        assert_same_ids(sorted_ids[:rows].cpu(), wanted, f"seed {seed}, sorted")
        assert bool((new_ids[rows:] == -1).all())
        twice = [2 * number for number in counts]  # both launches count
        assert counters[seed % 2].tolist() == twice
        assert not counters[1 - seed % 2].any()
        check_aligned(sorted_ids.cpu(), aligned, 16, 128)


def test_step_input_is_copied_in_order() -> None:
    """The host runs ahead: what it staged for one step must not leak into another."""
    device_step = StepInput(4096, GPU)
    device_settings = Settings(GPU)
    snapshots, wanted = [], []
    for number in range(200):
        kinds = torch.full((4096,), EXACT if number % 2 else REROUTABLE, dtype=torch.int8)
        kinds[number] = 0
        torch.cuda._sleep(200_000)  # the device is behind
        device_step.write(kinds.numpy(), counter_row=number % 2)
        case = make_case(seed=0, rows=1, experts=8, slots=4, select_top_k=number % 5)
        device_settings.write(policy(case), top_k=4, num_experts=8)
        snapshots.append((device_step.buffer.clone(), device_settings.buffer.clone()))
        wanted.append((kinds, number))
    for (step_bytes, setting_bytes), (kinds, number) in zip(snapshots, wanted, strict=True):
        assert torch.equal(step_bytes[STEP.size :].view(torch.int8).cpu(), kinds)
        s = number % 5
        assert setting_bytes.cpu().view(torch.int32)[0, 2] == (s if 0 < s < 4 else 4)


def test_wrong_tensors_are_named() -> None:
    case = as_launched(make_case(seed=0, rows=3, experts=8, slots=4, select_top_k=1))
    layer = device_layer(case, GPU)
    ids, weights = case.ids.to(GPU), case.weights.to(GPU)
    with pytest.raises(ValueError, match="topk_weights must be a contiguous"):
        kernel_of(case).reroute(ids, ids, weights.double(), layer)
    with pytest.raises(ValueError, match="topk_ids must be a contiguous"):
        kernel_of(case).reroute(ids.t().contiguous().t(), ids, weights, layer)
