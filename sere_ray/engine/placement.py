"""Which rank holds which expert of a layer."""

from typing import Any

import torch
from torch import Tensor


def expert_owner(runner: Any) -> Tensor:
    """The expert-parallel rank that holds each expert of a layer.

    Asked of vLLM, which falls back to linear placement where it lacks another one.

    Args:
        runner: vLLM's ``MoERunner`` of the layer.

    Returns:
        ``[E]`` int64, on the CPU.
    """
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    manager = runner.routed_experts.expert_map_manager
    num_experts = manager.global_num_experts
    owner = torch.zeros(num_experts, dtype=torch.int64, device="cpu")
    for rank in range(manager.ep_size):
        _, local_ids, _ = determine_expert_map(
            manager.ep_size, rank, num_experts, manager.placement_strategy
        )
        if local_ids is not None:  # None: one rank
            owner[local_ids.cpu() >= 0] = rank
    return owner
