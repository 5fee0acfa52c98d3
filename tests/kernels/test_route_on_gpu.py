"""``kernels/route.cu`` on a GPU: vLLM's top-k bit for bit, then the rule."""

import pytest
import torch

from sere_ray.kernel.launcher import MAX_ROUTED_ROWS, RuleKernel
from tests.rules.test_sere import Case, assert_same_ids, make_case

from .kernel_cases import as_launched, check_aligned, device_layer, expected
from .test_route_on_cpu import SHAPES, gate_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda", 0)


def vllm_top_k(logits, slots, renormalize, padding):
    ops = pytest.importorskip("vllm._custom_ops")
    rows = logits.shape[0]
    weights = torch.empty((rows, slots), device=GPU)
    ids, indices = (torch.empty((rows, slots), dtype=torch.int32, device=GPU) for _ in range(2))
    ops.topk_softmax(weights, ids, indices, logits, renormalize, is_padding=padding)
    return weights, ids


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
        new_ids, new_weights = torch.full_like(ids, -7), torch.full_like(weights, -7)
        aligned = kernel.route_and_align(
            logits,
            new_ids,
            new_weights,
            layer,
            is_padding=padding,
            renormalize=renormalize,
            block_size=16,
        )
        assert torch.equal(new_weights, weights), f"seed {seed}: weights differ"
        case = Case(
            case.recipe,
            ids.cpu(),
            weights.cpu(),
            case.similarity,
            case.row_kind,
            None,
            case.select_top_k,
            case.threshold,
            case.floor,
        )
        wanted, counts = expected(case)
        assert_same_ids(new_ids.cpu(), wanted, f"seed {seed}")
        assert tuple(layer.counters[1].tolist()) == counts
        check_aligned(new_ids.cpu(), aligned, 16, experts)
