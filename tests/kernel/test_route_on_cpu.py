"""``kernels/cuda/route.cu`` on the CPU: the gate's choice, the rule on it, the sorted slots."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sere_ray.kernel.launcher import RuleKernel
from sere_ray.rules import REROUTABLE
from tests.rules.test_sere import RULES, Case, assert_same_ids, make_case

from .emulator import COMPILER, launch
from .kernel_cases import as_launched, check_aligned, empty_alignment, expected, library
from .test_reroute_on_cpu import arguments

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernel with")

SHAPES = [(128, 8, torch.bfloat16), (64, 6, torch.bfloat16), (256, 8, torch.bfloat16)]
SHAPES += [(32, 4, torch.float32), (128, 8, torch.float32), (256, 3, torch.float32)]


def gate_logits(rows: int, experts: int, dtype: torch.dtype, seed: int, *, tied: bool) -> Tensor:
    """Random logits; ``tied``: of few values, so that experts tie."""
    g = torch.Generator().manual_seed(seed)
    if tied:
        return torch.randint(-3, 4, (rows, experts), generator=g).to(dtype)
    return torch.randn((rows, experts), generator=g).to(dtype)


def top_k(logits: Tensor, slots: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Ids and weights of a softmax gate: best first, equal ones by index."""
    p = logits.float().softmax(-1)
    order = p.sort(dim=-1, descending=True, stable=True).indices[:, :slots]
    weights = p.gather(-1, order)
    return order.int(), weights / weights.sum(-1, keepdim=True) if renormalize else weights


def route(
    case: Case,
    logits: Tensor,
    padding: Tensor | None,
    *,
    cache,
    threads,
    seed,
    block,
    renormalize,
    merges=False,
):
    """New ids, weights and counters of one launch; checks the sorted slots."""
    kernel = RuleKernel(case.experts, case.slots, torch.int32, logit_dtype=logits.dtype)
    new_ids = torch.full_like(case.ids, -7)
    weights = torch.full_like(case.weights, -7)
    rule, counters = arguments(case, case.ids, new_ids, weights=weights, merges=merges)
    aligned, sorted_arguments = empty_alignment(kernel, new_ids, block)
    launch(
        library(kernel, "route_and_align", threads, cache),
        "route_and_align",
        logits,
        padding,
        int(renormalize),
        weights,
        None,
        *rule[1:],
        *sorted_arguments,
        threads=threads,
        seed=seed,
    )
    check_aligned(new_ids, aligned, block, case.experts)
    return new_ids, weights, tuple(counters[1].tolist())


@pytest.mark.parametrize(("experts", "slots", "dtype"), SHAPES)
def test_routes_then_follows_the_rule(experts, slots, dtype, cache) -> None:
    @settings(RULES, max_examples=10)
    @given(
        rows=st.integers(0, 20) | st.sampled_from([63, 64]),
        seed=st.integers(0, 1000),
        select_top_k=st.integers(1, slots),
        floor=st.sampled_from([0, slots, 40]),
        kinds=st.sampled_from(["none", "mixed", "decode", "exact"]),
        threshold=st.sampled_from(["none", "entry", "zero"]),
        tied=st.booleans(),
        renormalize=st.booleans(),
        pads=st.booleans(),
    )
    def every(rows, seed, select_top_k, floor, kinds, threshold, tied, renormalize, pads) -> None:
        case = as_launched(
            make_case(
                seed=seed,
                rows=rows,
                experts=experts,
                slots=slots,
                select_top_k=select_top_k,
                floor=floor,
                kinds=kinds,
                threshold=threshold,
                id_dtype=torch.int32,
            )
        )
        logits = gate_logits(rows, experts, dtype, seed, tied=tied)
        ids, weights = top_k(logits, slots, renormalize=renormalize)
        padding = (torch.arange(rows) % 3 == 2) if pads else None
        if padding is not None:
            ids[padding] = -1
        case = Case(
            case.recipe,
            ids,
            # their order decides ranks; the kernel's slots come best first, as these do
            torch.arange(slots, 0, -1, dtype=torch.float32).expand(rows, slots).contiguous(),
            case.similarity,
            case.row_kind,
            case.select_top_k,
            case.threshold,
            case.floor,
        )
        new_ids, new_weights, counts = route(
            case,
            logits,
            padding,
            cache=cache,
            threads=512,
            seed=seed % 4,
            block=(16, 32, 64)[seed % 3],
            renormalize=renormalize,
        )
        wanted, wanted_counts = expected(case)
        assert_same_ids(new_ids, wanted, "route")
        if (case.kinds == REROUTABLE).any():
            assert counts == wanted_counts
        torch.testing.assert_close(new_weights, weights, rtol=1e-5, atol=1e-7)

    every()
