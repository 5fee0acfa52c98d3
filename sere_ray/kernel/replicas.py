"""Launch ``kernels/cuda/replicas.cu``: physical ids of a load balancer, copies chosen by reads."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sere_ray.kernel.launcher import RuleKernel

MAX_RANKS = 256
"""As in ``replicas.cu``."""
MAX_ROWS = 512
"""Most rows of a launch: of more, one block maps more slowly than vLLM's many."""


class Balancer(NamedTuple):
    """What vLLM's load balancer keeps of a layer, on the device; it changes between two steps."""

    copies: Tensor
    """``[E, R]`` int64 contiguous: physical ids of each expert's copies, then -1."""
    num_copies: Tensor
    """``[E]`` int64."""
    per_rank: int
    """Physical experts of a rank; those of rank r begin at ``r * per_rank``."""
    load: Tensor
    """``[P]`` int32: rows that each physical expert got; added to."""
    records: Tensor
    """``[]`` bool: whether it counts them now."""
    num_unpadded: Tensor
    """``[]`` int32: rows of the pass without padding."""


def map_to_copies(kernel: RuleKernel, topk_ids: Tensor, read: Tensor, balancer: Balancer) -> Tensor:
    """``[T, K]`` physical ids; counts rows for the balancer as vLLM's own launch does.

    Args:
        kernel: of the layer's shape.
        topk_ids: ``[T, K]`` contiguous, final logical ids of this rank's rows.
        read: ``[E]`` uint8: the experts that the rows of all ranks name; all 0 where that is not
            known, and then copies are chosen by a hash of the row.
        balancer: of the layer.
    """
    physical = torch.empty_like(topk_ids)
    arguments = (
        topk_ids.data_ptr(),
        physical.data_ptr(),
        np.int32(topk_ids.shape[0]),
        read.data_ptr(),
        balancer.copies.data_ptr(),
        np.int32(balancer.copies.shape[1]),
        balancer.num_copies.data_ptr(),
        np.int32(balancer.per_rank),
        np.int32(balancer.load.shape[0]),
        balancer.load.data_ptr(),
        balancer.records.data_ptr(),
        balancer.num_unpadded.data_ptr(),
    )
    kernel.launch("map_to_copies", topk_ids, arguments)
    return physical
