"""The ranks of a GPU engine over which one union is taken, of vLLM's groups."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sere_ray.engine.gpu.rank_group import RankGroup
from sere_ray.engine.timeout import group_timeout
from sere_ray.kernel.peers import connect


def ranks_of_engine(
    vllm_config: Any, num_experts: int, device: torch.device, shards: int
) -> RankGroup:
    """How this rank reaches the others: the group that vLLM gathers a layer's rows in.

    Where vLLM records experts, each rank has to know its own final ids before rows are sent.

    Args:
        vllm_config: vLLM's configuration, with data parallelism; its groups are there.
        num_experts: E.
        device: of this worker.
        shards: into how many vLLM cuts the rows of a data-parallel rank (``sp_size`` of a layer).
    """
    from torch.distributed import ReduceOp
    from vllm.distributed.parallel_state import get_dp_group, get_ep_group

    group = get_ep_group() if shards > 1 else get_dp_group()
    communicator = group.device_communicator.pynccl_comm  # as dispatch: graphs can hold it

    def reduce_by(operation: Any) -> Callable[[Tensor], None]:
        return lambda numbers: communicator.all_reduce(numbers, numbers, op=operation)

    return RankGroup(
        rank=group.rank_in_group,
        num_ranks=group.world_size,
        exchange=reduce_by(ReduceOp.MIN),
        add_up=reduce_by(ReduceOp.SUM),
        connect=partial(
            connect,
            group.device_group,
            group.cpu_group,
            num_experts,
            device,
            group_timeout(vllm_config),
        ),
        before_dispatch=vllm_config.aux_output_config.enable_return_routed_experts,
        shards=shards,
    )
