"""``replicas: by_experts``: copies of experts by experts read, where vLLM maps logical ids.

vLLM's load balancer (EPLB) spreads the rows of an expert over its copies by a hash. Here the launch
that maps ids also chooses, for the step, one copy of each expert (`kernels/cuda/replicas.cu`), from
what the re-routing launch before it tells that all ranks read. It reads vLLM's maps when it runs,
so that the balancer may change them between two steps. Copies have the same weights: were a map to
differ between ranks, answers would be right all the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sere_ray.engine.gpu.state import CudaState
from sere_ray.kernel.replicas import MAX_ROWS, Balancer, map_to_copies


def choose_copies(router: Any, state: CudaState) -> None:
    """Let a router map its ids so; vLLM's own map stays for passes of many rows.

    Args:
        router: vLLM's, of an engine with the load balancer and several ranks.
        state: of the engine.
    """
    union = state.union
    assert union is not None
    if union.read is None:
        union.read = torch.zeros(state.num_experts, dtype=torch.uint8, device=state.device)
    router._apply_eplb_mapping = partial(_map_ids, router, router._apply_eplb_mapping)


def _map_ids(router: Any, original: Callable[[Tensor], Tensor], topk_ids: Tensor) -> Tensor:
    """Physical ids of final logical ones, ``[T, K]`` each."""
    state: CudaState = router.sere_state
    union, balancer = state.union, router.eplb_state
    assert union is not None
    assert union.read is not None
    if topk_ids.shape[0] > MAX_ROWS or union.way != "before" or balancer is None:
        return original(topk_ids)
    of_layer = Balancer(
        copies=balancer.logical_to_physical_map,
        num_copies=balancer.logical_replica_count,
        per_rank=len(balancer.expert_load_view) // union.group.num_ranks,
        load=balancer.expert_load_view,
        records=balancer.should_record_tensor,
        num_unpadded=balancer.num_unpadded_tokens_tensors[0],  # no micro-batches: refused
    )
    kernel = state.rule.kernel(topk_ids.dtype)
    return map_to_copies(kernel, topk_ids.contiguous(), union.read, of_layer)
