"""Memory of other GPUs that a kernel of this rank writes to: ``kernels/cuda/exchange.cuh``."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sere_ray.kernel.memory import padded_experts


@dataclass(frozen=True)
class Peers:
    """The ranks that exchange, as one of them reaches them.

    Attributes:
        inboxes: ``[ranks]`` int64, on the device: where each rank's inbox is in this address space.
        number: ``[1]`` int32, on the device: exchanges so far.
        rank: of this one.
        patience_ns: until a rank that sends nothing ends the kernel, and so the process.
        memory: holds this rank's inbox.
    """

    inboxes: Tensor
    number: Tensor
    rank: int
    patience_ns: int
    memory: Any


def inbox_words(num_experts: int, num_ranks: int) -> int:
    """Length of an inbox in int64: two halves of a byte an expert of each rank, four to a word."""
    return 2 * num_ranks * padded_experts(num_experts) // 4


def connect(
    group: ProcessGroup,
    host_group: ProcessGroup,
    num_experts: int,
    device: torch.device,
    timeout: timedelta,
) -> Peers | None:
    """Give every rank of a group an inbox that the others write to; a collective call.

    Args:
        group: of the ranks' GPUs.
        host_group: of the same ranks, for messages between their hosts.
        num_experts: E.
        device: this rank's.
        timeout: how long a rank is waited for in a step.

    Returns:
        None on every rank if one of them does not reach all the others: on several hosts, or
        without NVLink and peer access.
    """
    import torch.distributed as dist
    from torch.distributed import _symmetric_memory as symmetric

    words = inbox_words(num_experts, group.size())
    addresses = None
    try:
        inbox = symmetric.empty(words, dtype=torch.int64, device=device)
        inbox.zero_()
        torch.cuda.synchronize(device)  # before a peer can write to it
        addresses = symmetric.rendezvous(inbox, group.group_name).buffer_ptrs
    except RuntimeError:
        pass  # what torch raises where peers are out of reach
    reached = torch.tensor([int(addresses is not None)])
    dist.all_reduce(reached, op=dist.ReduceOp.MIN, group=host_group)
    if addresses is None or not int(reached):
        return None
    return Peers(
        inboxes=torch.tensor(list(addresses), dtype=torch.int64, device=device),
        number=torch.zeros(1, dtype=torch.int32, device=device),
        rank=group.rank(),
        patience_ns=int(timeout.total_seconds() * 1e9),
        memory=inbox,
    )
