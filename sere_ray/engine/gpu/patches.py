"""What an engine on a GPU (V2 model runner) changes beside ``engine/patches.py``: its ledger.

=====================================  ==========================================================
target                                 what, why, remove when
=====================================  ==========================================================
GPUModelRunner.prepare_inputs          Row kinds of a step go to the device before it is launched.
                                       Why here: replay of a full graph passes through no forward
                                       context. Remove: vLLM hands row kinds to full graphs, too.
GPUModelRunner.add_requests            Remember which requests ask for exact routing. Why: the
                                       runner keeps no sampling parameters. Remove: it does.
GPUModelRunner.execute_model           A dummy pass (profiling, idle rank) has no row of anybody's.
                                       Remove: as for prepare_inputs.
Worker.sleep, wake_up                  Tables and settings lie in the memory that sleep gives away:
                                       they are written again on wake-up; level 2 is refused, after
                                       it weights have to be loaded again, see
                                       ``Worker.reload_weights``. Remove: vLLM calls back.
TritonExperts.apply                    Gate-and-up GEMM with SiLU in its epilogue, where ``tiles/``
                                       has tiles for the model's shape and this GPU. Remove: vLLM
                                       has such a kernel.
triton_moe._prepare_expert_assignment  While that runs: re-route and sort by expert in one launch,
                                       where stock launches two to sort; in small batches the
                                       gate's top-k, too. Remove: a hook between routing and
                                       sorting.
MarlinExperts.apply,                   The same for Marlin's experts (INT4, MXFP4), which sort by
marlin_moe.moe_align_block_size        this function. Remove: as above.
``gate.forward`` of a layer            With learned masks: the gate's product and the mask router's
                                       in one, see ``mask_router.py``. Remove: vLLM gives layers
                                       further products of their gate's input.
=====================================  ==========================================================

With data parallelism also those of ``union_patches.py``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.engine.back_end import Wrap
from sere_ray.engine.gpu.fused_experts import apply_experts
from sere_ray.engine.gpu.state import CudaState
from sere_ray.engine.row_kinds import draft_positions, row_kinds, scheduled_kinds
from sere_ray.engine.states import find_state
from sere_ray.policy.tiers import asks_exact
from sere_ray.rules import EXACT
from sere_ray.util.errors import UnsupportedError


def install(wrap: Wrap) -> None:
    """Put the patches in place; calling it again does nothing."""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    wrap(Worker, "sleep", sleep)
    wrap(Worker, "wake_up", wake_up)
    wrap(GPUModelRunner, "prepare_inputs", _send_row_kinds)
    wrap(GPUModelRunner, "add_requests", _notice_exact_requests)
    wrap(GPUModelRunner, "execute_model", _notice_dummy_pass)
    wrap(TritonExperts, "apply", _compute_experts)
    wrap(MarlinExperts, "apply", _compute_with_marlin)


def state_of_runner(runner: Any) -> CudaState | None:
    """The state of a GPUModelRunner's engine; None without the ``sere`` key."""
    return cast(CudaState | None, find_state(runner.vllm_config))


# --- steps ----------------------------------------------------------------------------------------


def _send_row_kinds(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    batch = original(runner, *args, **kwargs)
    state = state_of_runner(runner)
    if state is not None:
        state.check_nothing_deferred()
        if state.union is None:  # else ranks have agreed on the pass before
            _begin_step(state, batch)
    return batch


def _begin_step(state: CudaState, batch: Any) -> None:
    if all("_warmup_" in name for name in batch.req_ids):  # vLLM's own requests at start
        state.begin_dummy_step()
        return
    starts = batch.query_start_loc_np[: batch.num_reqs + 1]
    kinds = request_kinds(state, batch)
    state.begin_step(row_kinds(kinds, starts), draft_positions(kinds, starts))


def request_kinds(state: CudaState, batch: Any) -> NDArray[np.int8]:
    """Kind of each scheduled request's rows, from what the runner knows of the batch.

    Args:
        state: of the engine.
        batch: vLLM's, with ``req_ids`` and ``is_prefilling_np``.

    Returns:
        ``[requests]`` int8.
    """
    kinds = scheduled_kinds(batch.is_prefilling_np)
    for i, request in enumerate(batch.req_ids if state.exact_requests else ()):
        if request in state.exact_requests:
            kinds[i] = EXACT
    return kinds


def _notice_exact_requests(
    original: Callable[..., Any], runner: Any, scheduler_output: Any
) -> None:
    original(runner, scheduler_output)
    state = state_of_runner(runner)
    if state is not None:
        for new in scheduler_output.scheduled_new_reqs:
            if asks_exact(new.sampling_params):
                state.exact_requests.add(new.req_id)
        if state.exact_requests:
            state.exact_requests &= runner.req_states.req_id_to_index.keys()


def _notice_dummy_pass(
    original: Callable[..., Any],
    runner: Any,
    scheduler_output: Any,
    intermediate_tensors: Any = None,
    dummy_run: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    state = state_of_runner(runner)
    if dummy_run and state is not None and state.union is None:  # other ranks may have rows in it
        state.begin_dummy_step()
    return original(runner, scheduler_output, intermediate_tensors, dummy_run, *args, **kwargs)


# --- sleep ----------------------------------------------------------------------------------------


def sleep(original: Callable[..., Any], worker: Any, level: int = 1) -> Any:
    """``Worker.sleep``.

    Raises:
        UnsupportedError: weights would be loaded anew.
    """
    if level != 1 and find_state(worker.vllm_config) is not None:
        raise UnsupportedError(
            f"sere: sleep(level = {level}): weights would be loaded again, and gates not checked; "
            "use level 1, which keeps weights in host memory, or restart the engine"
        )
    return original(worker, level)


def wake_up(original: Callable[..., Any], worker: Any, tags: list[str] | None = None) -> Any:
    """``Worker.wake_up``: vLLM brings memory back by parts; ours was made beside the weights."""
    result = original(worker, tags)
    state = cast(CudaState | None, find_state(worker.vllm_config))
    if state is not None and (tags is None or "weights" in tags):
        state.write_again()
    return result


# --- layers ---------------------------------------------------------------------------------------


def _compute_experts(original: Callable[..., Any], experts: Any, *args: Any, **kwargs: Any) -> Any:
    state: CudaState | None = getattr(experts, "sere_state", None)
    if state is None or state.deferred is None:
        return original(experts, *args, **kwargs)
    with sorting_by(state):
        if args:  # not vLLM's modular kernel, which names all of them
            return original(experts, *args, **kwargs)
        return apply_experts(original, experts, **kwargs)


def _compute_with_marlin(
    original: Callable[..., Any], experts: Any, *args: Any, **kwargs: Any
) -> Any:
    state: CudaState | None = getattr(experts, "sere_state", None)
    if state is None or state.deferred is None:
        return original(experts, *args, **kwargs)
    with marlin_sorting_by(state):
        return original(experts, *args, **kwargs)


@contextmanager
def sorting_by(state: CudaState) -> Iterator[None]:
    """While this is open, vLLM's Triton experts have their slots sorted by the deferred launch."""
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    stock = triton_moe._prepare_expert_assignment

    def sort(topk_ids: Tensor, config: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        skips_foreign = bool(kwargs.get("ignore_invalid_experts"))
        aligned = state.align(topk_ids, config["BLOCK_SIZE_M"], skips_foreign)
        return aligned or stock(topk_ids, config, *args, **kwargs)

    with _replaced(triton_moe, "_prepare_expert_assignment", sort):
        yield


@contextmanager
def marlin_sorting_by(state: CudaState) -> Iterator[None]:
    """The same for vLLM's Marlin experts."""
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe

    stock = marlin_moe.moe_align_block_size

    def sort(topk_ids: Tensor, block_size: int, *args: Any, **kwargs: Any) -> Any:
        aligned = state.align(topk_ids, block_size)
        return aligned or stock(topk_ids, block_size, *args, **kwargs)

    with _replaced(marlin_moe, "moe_align_block_size", sort):
        yield


@contextmanager
def _replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    stock = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, stock)
