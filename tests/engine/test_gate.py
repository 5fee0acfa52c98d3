"""Which of vLLM's gates are a softmax and a top-k, and nothing more."""

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

from sere_ray.engine.gate import oddities

SIZES = {"top_k": 2, "global_num_experts": 4}


class Renamed(FusedTopKRouter):
    """Of another model, with another choice perhaps."""


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        (CPURouter(**SIZES), []),
        (FusedTopKRouter(**SIZES), []),
        (CPURouter(**SIZES, use_grouped_topk=True, num_expert_group=2), ["use_grouped_topk"]),
        (
            CPURouter(**SIZES, scoring_func="sigmoid", e_score_correction_bias=torch.zeros(4)),
            ["e_score_correction_bias", "scoring_func = sigmoid"],
        ),
        (
            CPURouter(**SIZES, custom_routing_function=lambda **_: None),
            ["custom_routing_function"],
        ),
        (FusedTopKRouter(**SIZES, scoring_func="sigmoid"), ["scoring_func = sigmoid"]),
        (Renamed(**SIZES), ["router = Renamed"]),
        (
            FusedTopKBiasRouter(
                **SIZES, scoring_func="softmax", e_score_correction_bias=torch.zeros(4)
            ),
            ["router = FusedTopKBiasRouter", "e_score_correction_bias"],
        ),
    ],
)
def test_what_is_odd_about_a_gate(router, expected):
    assert oddities(router) == expected
