"""Step 7 on a GPU: the cases of ``test_merging_on_cpu.py``, launched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_ray.rules import REROUTABLE
from tests.rules.test_sere import RULES, Case, assert_same_ids, cases

from .kernel_cases import as_launched, check_aligned, device_layer, expected, kernel_of, merged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("experts", "slots"), [(128, 8), (60, 4), (33, 16), (300, 5)])
@pytest.mark.parametrize("block", [None, 16])
def test_equals_reference(experts: int, slots: int, block: int | None) -> None:
    @settings(RULES)
    @given(case=cases(experts=experts, slots=slots, rows=st.integers(0, 512)))
    def every(case: Case) -> None:
        case = as_launched(case)
        ids, weights = case.ids.to(GPU), case.weights.to(GPU)
        layer, kernel = device_layer(case, GPU, merges=True), kernel_of(case)
        if block is None:
            kernel.reroute(ids, ids, weights, layer)
        else:
            aligned = kernel.reroute_and_align(ids, ids, weights, layer, block_size=block)
            check_aligned(ids.cpu(), aligned, block, experts)
        wanted_ids, wanted_weights, number = merged(case)
        if REROUTABLE not in case.kinds:
            wanted_ids, wanted_weights, number = case.ids, case.weights, 0
        assert_same_ids(ids.cpu(), wanted_ids, "kernel")
        assert torch.equal(weights.cpu(), wanted_weights)
        assert layer.counters[1].tolist() == [*expected(case)[1][:4], number, 0]

    every()
