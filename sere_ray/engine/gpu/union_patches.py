"""Where vLLM is changed for the union over data-parallel ranks of a GPU engine.

Ledger, as in ``seam.py``:

=====================================  ==========================================================
target                                 what, why, remove when
=====================================  ==========================================================
GPUModelRunner.gather_batch_req_state  Row kinds of the pass that ranks are about to agree on. Why:
                                       ``prepare_inputs`` comes after that. Remove: row kinds are in
                                       the forward context, of all ranks.
dp_utils.sync_cudagraph_and_dp_        Its all-reduce carries our rows, too, and the pass begins
padding                                when it returns. Why: see above. Remove: vLLM's DP sync takes
                                       extra values.
MoEPrepareAndFinalizeNaiveDPEPModular  Re-route what was gathered. Remove: a hook between dispatch
.prepare                               and experts.
=====================================  ==========================================================
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.engine.cpu.dispatch import group_timeout
from sere_ray.engine.gpu.patches import is_plain_softmax, request_kinds
from sere_ray.engine.gpu.union import NO_ROWS, UnionCudaState
from sere_ray.engine.row_kinds import row_kinds
from sere_ray.engine.state import Routing, Wrap, all_states, find_state
from sere_ray.kernel.across_ranks import Placement
from sere_ray.kernel.peers import connect
from sere_ray.util.errors import UnsupportedError


def install(wrap: Wrap) -> None:
    """Put the patches in place; calling it again does nothing."""
    from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import (
        MoEPrepareAndFinalizeNaiveDPEPModular,
    )
    from vllm.v1.worker.gpu import dp_utils
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    wrap(GPUModelRunner, "gather_batch_req_state", _note_kinds)
    wrap(dp_utils, "sync_cudagraph_and_dp_padding", _sync)
    wrap(MoEPrepareAndFinalizeNaiveDPEPModular, "prepare", _prepare)


_measured_way: ContextVar[bool] = ContextVar("sere_ray_before_dispatch", default=False)


@contextmanager
def before_dispatch() -> Iterator[None]:
    """Engines that are started inside take the way ``before``, whatever their back end."""
    token = _measured_way.set(True)
    try:
        yield
    finally:
        _measured_way.reset(token)


def ranks_of_engine(vllm_config: Any, num_experts: int, device: torch.device) -> dict[str, Any]:
    """What :class:`UnionCudaState` has to know of the data-parallel ranks."""
    from torch.distributed import ReduceOp
    from vllm.distributed.parallel_state import get_dp_group

    group = get_dp_group()
    communicator = group.device_communicator.pynccl_comm  # as dispatch: graphs can hold it

    timeout = group_timeout(vllm_config)

    def reduce_by(operation: Any) -> Callable[[Tensor], None]:
        return lambda numbers: communicator.all_reduce(numbers, numbers, op=operation)

    return {
        "rank": group.rank_in_group,
        "num_ranks": group.world_size,
        "exchange": reduce_by(ReduceOp.MIN),
        "add_up": reduce_by(ReduceOp.SUM),
        "connect": partial(
            connect, group.device_group, group.cpu_group, num_experts, device, timeout
        ),
        "before_dispatch": _measured_way.get(),
    }


def route(
    router: Any,
    original: Callable[..., Routing],
    hidden_states: Tensor,
    router_logits: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Routing:
    """The gate's choice, re-routed or waiting to be gathered; as ``cuda_seam.route``."""
    state: UnionCudaState = router.sere_state
    state.check_nothing_deferred()
    topk_weights, topk_ids = original(hidden_states, router_logits, *args, **kwargs)
    if router.capture_fn is not None:
        raise UnsupportedError(
            "sere: enable_return_routed_experts = True with data parallelism on a GPU: ids are "
            "re-routed after they were recorded; start without it"
        )
    layer, runner = router.sere_layer, router.sere_runner()
    gathers, sorts = _what_follows(runner)
    placement = state.placements.get(layer)
    if gathers and placement is None:  # in the first pass, which no graph captures
        placement = _placement(runner, state.num_experts, state.device)
    scores = state.scores_of(layer, router_logits, is_softmax=is_plain_softmax(router))
    state.route_layer(
        layer, topk_ids, topk_weights, placement=placement, sorts=sorts, logits=scores
    )
    return topk_weights, topk_ids


_stepping: list[UnionCudaState] = []
"""The engine whose pass is about to be agreed on: that of the runner that gathered last."""


def _note_kinds(
    original: Callable[..., Any], runner: Any, scheduler_output: Any, dummy_run: bool
) -> Any:
    result = original(runner, scheduler_output, dummy_run)
    _stepping.clear()
    state = find_state(runner.vllm_config)
    if isinstance(state, UnionCudaState):
        state.next_kinds = _kinds_of(state, result[0])
        _stepping.append(state)
    return result


def _kinds_of(state: UnionCudaState, batch: Any) -> NDArray[np.int8]:
    """None is a dummy pass; vLLM's own requests at start are nobody's, too."""
    if batch is None or all("_warmup_" in name for name in batch.req_ids):
        return NO_ROWS
    starts = np.cumsum([0, *batch.num_scheduled_tokens])
    return row_kinds(request_kinds(state, batch), starts)


def _sync(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not _stepping:
        return original(*args, **kwargs)
    state = _stepping.pop()
    with carried_along(state.words(), state.rank) as carried:
        batch, agreed = original(*args, **kwargs)
    if agreed is not None:  # None: no rank has work
        state.begin_pass(carried(), agreed.num_tokens_across_dp.tolist())
    return batch, agreed


@contextmanager
def carried_along(words: NDArray[np.int32], rank: int) -> Iterator[Callable[[], NDArray[np.int32]]]:
    """While this is open, vLLM's all-reduce of a table ``[n, ranks]`` sums our rows below it, too.

    Args:
        words: ``[words]`` of this rank.
        rank: its column.

    Yields:
        Gives the ``[words, ranks]`` of all ranks afterwards.
    """
    from vllm.v1.worker.gpu import dp_utils

    real = dp_utils.dist
    found: list[NDArray[np.int32]] = []

    def all_reduce(table: Tensor, group: Any) -> None:
        rows, ranks = table.shape
        longer = torch.zeros((rows + len(words), ranks), dtype=torch.int32, device="cpu")
        longer[:rows] = table
        longer[rows:, rank] = torch.from_numpy(words)
        real.all_reduce(longer, group=group)
        table.copy_(longer[:rows])
        found.append(longer[rows:].numpy())

    def carried() -> NDArray[np.int32]:
        if len(found) != 1:
            raise UnsupportedError(
                "sere: vLLM did not agree on this pass by one all-reduce (elastic expert "
                "parallelism?); start without it"
            )
        return found[0]

    dp_utils.dist = SimpleNamespace(all_reduce=all_reduce)
    try:
        yield carried
    finally:
        dp_utils.dist = real


def _prepare(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    waiting = (s for s in all_states() if isinstance(s, UnionCudaState) and s.awaited)
    state = next(waiting, None)
    if state is not None:
        state.take_gathered(topk_ids=result[3], topk_weights=result[4])
    return result


def _what_follows(runner: Any) -> tuple[bool, bool]:
    """Are the ids of all ranks gathered, and may the experts be given them sorted?

    Where a load balancer (EPLB) maps ids before they are gathered, the gathered ones are not those
    that the rule speaks of: then the union is exchanged before.
    """
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import (
        MoEPrepareAndFinalizeNaiveDPEPModular,
    )

    experts, kernel = runner.routed_experts, runner.routed_experts.quant_method.moe_kernel
    if kernel is None:
        raise UnsupportedError(
            f"sere: layer {runner.layer_name!r} sends its rows to all ranks before it routes them "
            f"({type(experts.quant_method).__name__}); use data_parallel_size = 1"
        )
    if runner.router.eplb_state is not None:
        return False, False
    gathers = type(kernel.prepare_finalize) is MoEPrepareAndFinalizeNaiveDPEPModular
    sorts = type(kernel.fused_experts) is TritonExperts and not experts.apply_router_weight_on_input
    return gathers, gathers and sorts


def _placement(runner: Any, num_experts: int, device: torch.device) -> Placement:
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    parallel = runner.moe_config.moe_parallel_config
    owner = torch.zeros(num_experts, dtype=torch.uint8, device="cpu")
    for rank in range(parallel.ep_size):
        strategy = runner.expert_placement_strategy
        _, local_ids, _ = determine_expert_map(parallel.ep_size, rank, num_experts, strategy)
        owner[local_ids.cpu() >= 0] = rank
    own_ids = runner.routed_experts.expert_map
    if not torch.equal(own_ids.cpu() >= 0, owner == parallel.ep_rank):
        raise UnsupportedError(
            f"sere: layer {runner.layer_name!r} does not place its experts as vLLM's "
            f"{strategy!r} strategy does; start without a load balancer"
        )
    local_ids = own_ids.to(device, torch.int32).contiguous()
    return Placement(local_ids, owner.to(device), parallel.ep_size)
