"""Launches on a GPU that the tests of several rules share."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sere_ray.kernel.launcher import RuleKernel
from sere_ray.kernel.memory import DeviceLayer

from .kernel_cases import check_aligned

GPU = torch.device("cuda", 0)
HAS_CLUSTERS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
BLOCKS = [1, 2, 8] if HAS_CLUSTERS else [1]
"""Of a launch; more than one are a cluster."""


class Routed(NamedTuple):
    """What a launch of ``route_and_align`` wrote, on the GPU."""

    ids: Tensor
    weights: Tensor


def vllm_top_k(
    logits: Tensor, slots: int, renormalize: bool, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights and ids of vLLM's gate."""
    ops = pytest.importorskip("vllm._custom_ops")
    rows = logits.shape[0]
    weights = torch.empty((rows, slots), device=GPU)
    ids, indices = (torch.empty((rows, slots), dtype=torch.int32, device=GPU) for _ in range(2))
    ops.topk_softmax(weights, ids, indices, logits, renormalize, is_padding=padding)
    return weights, ids


def route(
    kernel: RuleKernel,
    logits: Tensor,
    layer: DeviceLayer,
    *,
    padding: Tensor | None,
    renormalize: bool,
    blocks: int = 1,
) -> Routed:
    """One launch; checks the sorted slots."""
    shape = (logits.shape[0], kernel.top_k)
    routed = Routed(
        torch.full(shape, -7, dtype=torch.int32, device=GPU), torch.full(shape, -7.0, device=GPU)
    )
    aligned = kernel.route_and_align(
        logits,
        *routed,
        layer,
        is_padding=padding,
        renormalize=renormalize,
        block_size=16,
        blocks=blocks,
    )
    check_aligned(routed.ids.cpu(), aligned, 16, kernel.num_experts)
    return routed
