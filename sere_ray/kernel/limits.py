"""What the kernels take: shapes, types, and the file of each."""

import torch
from torch import Tensor

from sere_ray.kernel.memory import power_of_two
from sere_ray.util.errors import UnsupportedError

MAX_EXPERTS = 1024
MAX_TOP_K = 32
MAX_ROUTED_ROWS = 64
"""Most rows whose top-k the kernel computes, too; more rows need more than one block."""
MAX_ROUTED_TOP_K = 16
"""Most slots of such a row; more do not fit shared memory."""
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
    "map_to_copies": "replicas.cu",
}
"""Which file of ``kernels/cuda/`` holds a kernel."""
LOGIT_DTYPES = (torch.bfloat16, torch.float32)
"""Of the gate's logits, as the kernels read them."""


def max_aligned_rows(num_experts: int, top_k: int) -> int:
    """Most rows of a batch whose slots the kernel also sorts by expert; decode graphs end there.

    A block holds two numbers for each slot, and six for each expert, in 48 KiB of shared memory.

    Args:
        num_experts: E.
        top_k: K.
    """
    slots = 8192 if num_experts <= 512 else 4096
    return min(slots // top_k, 512)


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


def unreadable(logits: Tensor) -> str:
    """Why the kernels cannot read these."""
    readable = " or ".join(str(dtype) for dtype in LOGIT_DTYPES)
    return (
        f"logits of {logits.dtype} with strides {logits.stride()}, where the kernels read "
        f"contiguous {readable}"
    )


def blocks_of_margin(rows: int, device: torch.device) -> int:
    """Blocks that share the rows of a launch under ``margin`` or ``spare``: a cluster of them.

    Args:
        rows: T.
        device: 1 where its compute capability is below 9.0, as it has no clusters.
    """
    if torch.cuda.get_device_capability(device) < (9, 0):
        return 1
    return min(power_of_two(-(-rows // ROWS_OF_BLOCK)), MAX_BLOCKS)
