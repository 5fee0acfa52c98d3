"""Where vLLM is changed for the union over data-parallel ranks of a GPU engine.

The ledger, in addition to that of ``patches.py``:

=====================================  ==========================================================
target                                 what, why, remove when
=====================================  ==========================================================
GPUModelRunner.gather_batch_req_state  Row kinds of the pass that ranks are about to agree on. Why:
                                       ``prepare_inputs`` comes after that. Remove: row kinds are in
                                       the forward context, of all ranks.
dp_utils.sync_cudagraph_and_dp_        Its all-reduce carries our rows, too, and the pass begins
padding                                when it returns. Why: kinds of all ranks are needed, and
                                       full graphs leave no later place for an exchange. Remove:
                                       vLLM's DP sync takes extra values.
BaseRouter._apply_eplb_mapping         Copies of experts chosen by reads (``copies.py``), under
                                       ``replicas: by_experts`` alone, on each router. Why: vLLM
                                       spreads rows over all copies. Remove: vLLM can choose so.
MoEPrepareAndFinalizeNaiveDPEPModular  Re-route what was gathered. Remove: a hook between dispatch
.prepare                               and experts.
=====================================  ==========================================================
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.engine.back_end import Wrap
from sere_ray.engine.gpu.patches import request_kinds, state_of_runner
from sere_ray.engine.gpu.state import CudaState
from sere_ray.engine.gpu.union import NO_ROWS
from sere_ray.engine.row_kinds import row_kinds
from sere_ray.engine.states import state_of_ranks
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


def _note_kinds(
    original: Callable[..., Any], runner: Any, scheduler_output: Any, dummy_run: bool
) -> Any:
    result = original(runner, scheduler_output, dummy_run)
    state = state_of_runner(runner)
    if state is not None and state.union is not None:
        state.union.next_kinds = _kinds_of(state, result[0])
    return result


def _kinds_of(state: CudaState, batch: Any) -> NDArray[np.int8]:
    """None is a dummy pass; vLLM's own requests at start are nobody's, too."""
    if batch is None or all("_warmup_" in name for name in batch.req_ids):
        return NO_ROWS
    starts = np.cumsum([0, *batch.num_scheduled_tokens])
    return row_kinds(request_kinds(state, batch), starts)


def _sync(
    original: Callable[..., Any], *args: Any, parallel_config: Any = None, **kwargs: Any
) -> Any:
    """The configuration says whose pass it is: engines of this process may come without the key."""
    state = cast(CudaState | None, state_of_ranks(parallel_config))
    if state is None or state.union is None:
        return original(*args, parallel_config=parallel_config, **kwargs)
    with carried_along(state.words(), state.union.group.data_rank) as carried:
        batch, agreed = original(*args, parallel_config=parallel_config, **kwargs)
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

    found: list[NDArray[np.int32]] = []

    def sum_with_ours(table: Tensor, sum_of_ranks: Callable[[Tensor], Any]) -> None:
        rows, ranks = table.shape
        longer = torch.zeros((rows + len(words), ranks), dtype=torch.int32, device="cpu")
        longer[:rows] = table
        longer[rows:, rank] = torch.from_numpy(words)
        sum_of_ranks(longer)
        table.copy_(longer[:rows])
        found.append(longer[rows:].numpy())

    def carried() -> NDArray[np.int32]:
        if len(found) != 1:
            raise UnsupportedError(
                "sere: vLLM did not agree on this pass by one all-reduce (elastic expert "
                "parallelism?); start without it"
            )
        return found[0]

    name, stand_in = _stand_in(dp_utils, sum_with_ours)
    real = getattr(dp_utils, name)
    setattr(dp_utils, name, stand_in)
    try:
        yield carried
    finally:
        setattr(dp_utils, name, real)


def _stand_in(
    dp_utils: Any, sum_with: Callable[[Tensor, Callable[[Tensor], Any]], None]
) -> tuple[str, Any]:
    """Global name of the module that it reaches the sum by, and what is to stand there."""
    if hasattr(dp_utils, "dist"):  # vLLM 0.32
        dist = dp_utils.dist

        def all_reduce(table: Tensor, group: Any) -> None:
            sum_with(table, lambda longer: dist.all_reduce(longer, group=group))

        return "dist", SimpleNamespace(all_reduce=all_reduce)

    group_of = dp_utils.get_dp_group  # vLLM 0.33

    def cpu_all_reduce_(table: Tensor) -> None:
        sum_with(table, group_of().cpu_all_reduce_)

    return "get_dp_group", lambda: SimpleNamespace(cpu_all_reduce_=cpu_all_reduce_)


def _prepare(original: Callable[..., Any], prepare: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(prepare, *args, **kwargs)
    state: CudaState | None = getattr(prepare, "sere_state", None)
    if state is not None and state.union is not None and state.union.expects_ids:
        state.take_gathered(topk_ids=result[3], topk_weights=result[4])
    return result
