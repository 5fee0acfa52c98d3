"""What the kernels take: shapes, types, and the file of each."""

import torch
from torch import Tensor

from sere_ray.kernel.memory import power_of_two
from sere_ray.util.errors import UnsupportedError

MAX_EXPERTS = 512
MAX_TOP_K = 16
MAX_ALIGNED_ROWS = 512
"""Most rows of a batch whose slots the kernel also sorts by expert; decode graphs end there."""

MAX_ROUTED_ROWS = 64
"""Most rows whose top-k the kernel computes, too; more rows need more than one block."""
MAX_BLOCKS = 8
"""Of a cluster, on every GPU that has clusters; as in ``kernels/cuda/cluster.cuh``."""
ROWS_OF_BLOCK = 4
"""Rows that a block of a cluster has at least: a warp's each, and so many warps run at once."""
FILES = {
    "reroute": "reroute.cu",
    "reroute_and_align": "reroute.cu",
    "route_and_align": "route.cu",
    "reroute_gathered": "across_ranks.cu",
    "reroute_gathered_and_align": "across_ranks.cu",
    "lowest_slot_orders": "across_ranks.cu",
    "reroute_by_slot_orders": "across_ranks.cu",
    "reroute_with_peers": "across_ranks.cu",
    "ask_of_ranks": "across_ranks.cu",
    "reroute_by_asked": "across_ranks.cu",
}
"""Which file of ``kernels/cuda/`` holds a kernel."""
LOGIT_DTYPES = (torch.bfloat16, torch.float32)
"""Of the gate's logits, as the kernels read them."""


def check_shape(num_experts: int, top_k: int) -> None:
    """Refuse layers that a block does not hold.

    Raises:
        UnsupportedError: names the shape and the limits.
    """
    if not (0 < num_experts <= MAX_EXPERTS and 0 < top_k <= MAX_TOP_K):
        raise UnsupportedError(
            f"num_experts = {num_experts}, top_k = {top_k}: the CUDA kernel takes up to "
            f"{MAX_EXPERTS} experts and {MAX_TOP_K} slots; serve this model without the 'sere' key"
        )


def reads_logits(logits: Tensor) -> bool:
    """Whether the kernels can read these."""
    return logits.dtype in LOGIT_DTYPES and logits.is_contiguous()


def blocks_of_margin(rows: int, device: torch.device) -> int:
    """Blocks that share the rows of a launch under the rule ``margin``: a cluster of them.

    Args:
        rows: T.
        device: 1 where its compute capability is below 9.0, as it has no clusters.
    """
    if torch.cuda.get_device_capability(device) < (9, 0):
        return 1
    return min(power_of_two(-(-rows // ROWS_OF_BLOCK)), MAX_BLOCKS)
