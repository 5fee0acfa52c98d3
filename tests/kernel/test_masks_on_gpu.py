"""Learned masks before the rule, in one launch, on a GPU: the integers of the specification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rules.test_sere import RULES, assert_same_ids

from .gpu_launches import BLOCKS, GPU
from .kernel_cases import check_aligned
from .margin_cases import GPU_MATH, Found
from .mask_cases import (
    LEFT,
    OF_RULE,
    MaskCase,
    check_masked,
    expected,
    make_mask_case,
    mask_cases,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPES = [(128, 8), (60, 4), (256, 8), (512, 10), (33, 16), (9, 3)]


def run(case: MaskCase, *, block: int | None, blocks: int, merges: bool) -> Found:
    """One launch of ``reroute``, or of ``reroute_and_align`` with a block size."""
    kernel, batch = case.kernel(), case.batch
    layer = case.device_layer(GPU, "on", merges=merges, masks=True)
    ids, weights = batch.ids.to(GPU), batch.weights.to(GPU)
    how = {
        "logits": batch.logits.to(GPU),
        "mask_logits": case.mask_logits.to(GPU),
        "blocks": blocks,
    }
    if block:
        aligned = kernel.reroute_and_align(ids, ids, weights, layer, block_size=block, **how)
        check_aligned(ids.cpu(), aligned, block, case.experts)
    else:
        kernel.reroute(ids, ids, weights, layer, **how)
    assert not layer.counters[0].any()
    return ids.cpu(), weights.cpu(), tuple(layer.counters[1].tolist())


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("rule", OF_RULE)
@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_equals_the_specification(experts: int, slots: int, rule: str, blocks: int) -> None:
    @settings(RULES, max_examples=20)
    @given(
        case=mask_cases(rule, experts=experts, slots=slots),
        block=st.sampled_from([None, 16, 64]),
        merges=st.booleans(),
    )
    def every(case: MaskCase, block: int | None, merges: bool) -> None:
        found = run(case, block=block, blocks=blocks, merges=merges)
        check_masked(found, expected(case, GPU_MATH, merges=merges), case)

    every()


@pytest.mark.parametrize("rule", ["none", "sere", "margin"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_routes_then_leaves_out(rule: str, blocks: int) -> None:
    """The gate's top-k in the launch, too."""
    shape = {"experts": 128, "slots": 8, "rows": 24, "shuffled": False, "kinds": "decode"}
    knobs = {"tau": 0.02} if rule == "margin" else {}
    for seed, left in enumerate(LEFT):
        case = make_mask_case(rule=rule, left=left, keep_first=False, seed=seed, **shape, **knobs)
        logits, ids = case.batch.logits, case.batch.ids
        weights = logits.float().softmax(dim=1).gather(1, ids.long())
        case = case._replace(batch=case.batch._replace(weights=weights))
        kernel = case.kernel()
        layer = case.device_layer(GPU, "on", merges=True, masks=True)
        new_ids, new_weights = torch.full_like(ids, -7).to(GPU), torch.zeros_like(weights).to(GPU)
        aligned = kernel.route_and_align(
            logits.to(GPU),
            new_ids,
            new_weights,
            layer,
            is_padding=None,
            renormalize=False,
            block_size=16,
            mask_logits=case.mask_logits.to(GPU),
            blocks=blocks,
        )
        check_aligned(new_ids.cpu(), aligned, 16, case.experts)
        wanted = expected(case, GPU_MATH, merges=True)
        assert_same_ids(new_ids.cpu(), wanted[0], rule)
        assert tuple(layer.counters[1].tolist()) == wanted[2]
        torch.testing.assert_close(new_weights.cpu(), wanted[1], rtol=1e-5, atol=1e-7)
