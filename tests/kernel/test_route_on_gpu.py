"""``kernels/cuda/route.cu`` on a GPU: vLLM's top-k bit for bit, then the rule."""

import pytest
import torch

from sere_ray.kernel.launcher import RuleKernel
from sere_ray.kernel.limits import MAX_ROUTED_ROWS
from tests.rules.test_sere import Case, assert_same_ids, make_case

from .gpu_launches import BLOCKS, GPU, route, vllm_top_k
from .kernel_cases import as_launched, device_layer, expected
from .test_route_on_cpu import SHAPES, gate_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "slots", "dtype"), SHAPES)
def test_vllms_choice_then_the_rule(experts, slots, dtype, renormalize) -> None:
    kernel = RuleKernel(experts, slots, torch.int32, logit_dtype=dtype)
    for seed in range(40):
        rows = (1, 2, 7, 16, 33, MAX_ROUTED_ROWS)[seed % 6]
        case = as_launched(
            make_case(
                seed=seed,
                rows=rows,
                experts=experts,
                slots=slots,
                select_top_k=1 + seed % slots,
                floor=(0, slots)[seed % 2],
                kinds=("none", "mixed", "decode")[seed % 3],
                threshold=("none", "entry")[seed % 2],
                id_dtype=torch.int32,
            )
        )
        scale = (1e-5, 1.0, 8.0)[seed % 3]  # nearly equal weights, usual ones, one that dominates
        logits = gate_logits(rows, experts, dtype, seed, tied=seed % 4 == 3).to(GPU) * scale
        padding = (torch.arange(rows) % 5 == 4).to(GPU) if seed % 2 else None
        weights, ids = vllm_top_k(logits, slots, renormalize, padding)
        layer = device_layer(case, GPU)
        blocks = BLOCKS[seed // 2 % len(BLOCKS)]  # all but one end at once
        new_ids, new_weights = route(
            kernel, logits, layer, padding=padding, renormalize=renormalize, blocks=blocks
        )
        assert torch.equal(new_weights, weights), f"seed {seed}: weights differ"
        case = Case(
            case.recipe,
            ids.cpu(),
            weights.cpu(),
            case.similarity,
            case.row_kind,
            case.select_top_k,
            case.threshold,
            case.floor,
        )
        wanted, counts = expected(case)
        assert_same_ids(new_ids.cpu(), wanted, f"seed {seed}")
        assert tuple(layer.counters[1].tolist()) == counts
