"""Expert parallelism in the CPU build of vLLM 0.32: what it lacks, and the ledger of it.

Stock crashes there. These patches are put in place under a ``sere`` key, on a CPU, where
``enable_expert_parallel`` is set, and nowhere else:

=====================================  ==========================================================
target                                 what, why, remove when
=====================================  ==========================================================
CPUUnquantizedExperts.apply            Compute the slots of this rank's experts and drop the
                                       others. Why: stock ignores ``expert_map`` and reads local
                                       weights at global ids (a segmentation fault). Remove: the
                                       kernel takes ``expert_map``.
CpuCommunicator.all_gatherv            Ranks with different numbers of rows, and with none,
CpuCommunicator.reduce_scatterv        exchange them through gloo. Why: stock raises
                                       NotImplementedError. Remove: vLLM has them.
MoERunner._forward_entry               Call the layer through vLLM's own opaque op, as on GPUs.
                                       Why: a CPU layer is traced into the compiled graph, which
                                       can hold neither a number of owned slots nor the row counts
                                       of other ranks. Remove: with the other three.
=====================================  ==========================================================
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sere_ray.engine.back_end import Wrap
from sere_ray.engine.cpu.state import active_state
from sere_ray.util.errors import UnsupportedError


def install(wrap: Wrap) -> None:
    """Put the patches of the classes in place; calling it again does nothing."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    wrap(CPUUnquantizedExperts, "apply", _drop_foreign_slots)
    wrap(CpuCommunicator, "all_gatherv", _all_gatherv)
    wrap(CpuCommunicator, "reduce_scatterv", _reduce_scatterv)


def prepare_layer(runner: Any, backend: Any) -> None:
    """Make one layer work across ranks.

    Args:
        runner: vLLM's ``MoERunner``.
        backend: the class of its expert kernel.

    Raises:
        UnsupportedError: the kernel is none that the patches above reach.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    if not (isinstance(backend, type) and issubclass(backend, CPUUnquantizedExperts)):
        raise UnsupportedError(
            f"sere: enable_expert_parallel = True and layer {runner.layer_name!r} computes its "
            f"experts with {getattr(backend, '__name__', backend)}, which ignores which experts a "
            "rank holds on a CPU; serve an unquantised model or leave enable_expert_parallel out"
        )
    ops = torch.ops.vllm
    runner._forward_entry = (
        ops.moe_forward if runner.shared_experts is None else ops.moe_forward_shared
    )


def _drop_foreign_slots(
    original: Callable[..., Any],
    experts: Any,
    *,
    output: Tensor,
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    **others: Any,
) -> Any:
    """Hand the kernel one row of one slot for every slot whose expert lives here.

    Args:
        original: the kernel of ``experts``.
        experts: vLLM's object of the layer.
        output: ``[T, H]``, written: per row the sum over its slots here, zeros where it has none.
        hidden_states: ``[T, H]``.
        topk_weights: ``[T, K]`` float32.
        topk_ids: ``[T, K]`` int32, global; -1 is no expert.
        expert_map: ``[E]`` int32, global to local id, -1 for experts of other ranks.
        others: as the kernel takes them.
    """
    arguments = {**others, "expert_map": None}
    if expert_map is None:
        return original(
            experts,
            output=output,
            hidden_states=hidden_states,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            **arguments,
        )
    local_ids = expert_map[topk_ids.clamp(min=0).long()].masked_fill(topk_ids < 0, -1)
    rows, slots = (local_ids >= 0).nonzero(as_tuple=True)
    # The kernel rounds every slot to the model's type here; their sum is rounded once.
    sums = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
    if len(rows):
        parts = hidden_states.new_empty((len(rows), output.shape[1]))
        original(
            experts,
            output=parts,
            hidden_states=hidden_states[rows],
            topk_weights=topk_weights[rows, slots].unsqueeze(1),
            topk_ids=local_ids[rows, slots].unsqueeze(1).to(torch.int32),
            **arguments,
        )
        sums.index_add_(0, rows, parts.float())
    output.copy_(sums)
    return None


def _all_gatherv(
    original: Callable[..., Any],
    communicator: Any,
    input_: Tensor | list[Tensor],
    dim: int = 0,
    sizes: list[int] | None = None,
) -> Tensor | list[Tensor]:
    """Rows of all ranks in rank order; ``sizes`` holds the number of rows of each rank."""
    assert dim == 0
    group = communicator.device_group
    if (state := active_state()) is not None and state.sent is not None:
        tensors = input_ if isinstance(input_, list) else [input_]
        state.sent.add_gathered(sum(x.nbytes for x in tensors) * (group.size() - 1))
    if isinstance(input_, list):
        return gather_together(input_, sizes, group)
    return gather_rows(input_, sizes, group)


def _reduce_scatterv(
    original: Callable[..., Any],
    communicator: Any,
    input_: Tensor,
    dim: int = -1,
    sizes: list[int] | None = None,
) -> Tensor:
    """Sum over ranks of this rank's rows; ``sizes`` holds the number of rows of each rank."""
    assert dim == 0
    return reduce_rows(input_, sizes, communicator.device_group)


def gather_together(
    tensors: list[Tensor], sizes: list[int] | None, group: dist.ProcessGroup
) -> list[Tensor]:
    """:func:`gather_rows` of several tensors, as bytes of one: a decode step waits for the number
    of exchanges, not for their bytes.

    Args:
        tensors: each ``[n, ...]``, of any type.
        sizes: n of every rank; None = the same everywhere.
        group: a gloo group.
    """
    parts = [x.contiguous().flatten(1).view(torch.uint8) for x in tensors]
    gathered = gather_rows(torch.cat(parts, dim=1), sizes, group)
    columns = gathered.split_with_sizes([part.shape[1] for part in parts], dim=1)
    return [
        column.clone(memory_format=torch.contiguous_format).view(x.dtype).view(-1, *x.shape[1:])
        for column, x in zip(columns, tensors, strict=True)
    ]


def gather_rows(rows: Tensor, sizes: list[int] | None, group: dist.ProcessGroup) -> Tensor:
    """All-gather of uneven blocks of rows.

    Args:
        rows: ``[n, ...]`` of this rank.
        sizes: n of every rank; None = the same everywhere.
        group: a gloo group, which gathers only even blocks but exchanges uneven ones.

    Returns:
        ``[sum(sizes), ...]``, in rank order.
    """
    ranks = group.size()
    sizes = sizes or [rows.shape[0]] * ranks
    gathered = rows.new_empty((sum(sizes), *rows.shape[1:]))
    sent = rows.repeat(ranks, *[1] * (rows.dim() - 1))
    dist.all_to_all_single(gathered, sent, sizes, [rows.shape[0]] * ranks, group=group)
    return gathered


def reduce_rows(partial: Tensor, sizes: list[int] | None, group: dist.ProcessGroup) -> Tensor:
    """Reduce-scatter of uneven blocks of rows, summed in float32 and in rank order.

    Args:
        partial: ``[sum(sizes), H]``, this rank's part of every row.
        sizes: rows of every rank; None = the same everywhere.
        group: a gloo group.

    Returns:
        ``[sizes[rank], H]``, the same type.
    """
    ranks = group.size()
    sizes = sizes or [partial.shape[0] // ranks] * ranks
    mine = sizes[group.rank()]
    assert partial.shape[0] == sum(sizes)
    parts = partial.new_empty((ranks * mine, *partial.shape[1:]))
    dist.all_to_all_single(parts, partial.contiguous(), [mine] * ranks, sizes, group=group)
    return parts.view(ranks, mine, *partial.shape[1:]).float().sum(dim=0).to(partial.dtype)
