"""What an engine on a CPU (V1 model runner) changes beside ``engine/patches.py``: the ledger of it.

=====================================  ==========================================================
target                                 what, why, remove when
=====================================  ==========================================================
GPUModelRunner._model_forward          Row kinds and step totals around the forward pass (warm-up
                                       calls the model directly and so stays exact). Remove: vLLM
                                       exposes row kinds in the forward context.
dispatcher._rebind_kernels             A second engine in one process: vLLM looks through every
                                       loaded module for kernels and stumbles over llvmlite's
                                       library object, which the compiled rule brings in (numba).
                                       Remove: vLLM reads ``__dict__`` with a type check.
GPUModelRunner._dummy_run              With ``enable_expert_parallel``: take part in the exchange
                                       of data-parallel ranks. Why: a dummy pass calls the model
                                       directly, past ``_model_forward``. Remove: as for
                                       GPUModelRunner._model_forward.
(none) ``ask_for_tiles``               The process asks for the tile registers of AMX, which vLLM's
                                       ``X86CPUUnquantizedExperts`` use without asking. Remove:
                                       vLLM asks.
=====================================  ==========================================================

With ``enable_expert_parallel`` also those of ``expert_parallel.py``, with ``dispatch: all_to_all``
that of ``dispatch.py``.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sere_ray.engine.back_end import Wrap
from sere_ray.engine.cpu import expert_parallel
from sere_ray.engine.cpu.state import CpuState, active_state
from sere_ray.engine.row_kinds import draft_positions, request_kinds, row_kinds
from sere_ray.engine.signatures import PromptRows, counting, prompt_rows
from sere_ray.engine.states import find_state
from sere_ray.policy.tiers import asks_exact
from sere_ray.rules import EXACT, Choice


def install(wrap: Wrap, *, across_ranks: bool) -> None:
    """Put the patches in place; calling it again does nothing.

    Args:
        wrap: see :data:`sere_ray.engine.back_end.Wrap`.
        across_ranks: whether vLLM's ``enable_expert_parallel`` is set.
    """
    from vllm.triton_utils import dispatcher
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "_model_forward", _run_step)
    wrap(dispatcher, "_rebind_kernels", hide_llvmlite)
    if across_ranks:
        expert_parallel.install(wrap)
        wrap(GPUModelRunner, "_dummy_run", _run_dummy)


@functools.cache
def define_op() -> None:
    """One opaque op, so that Dynamo does not trace the rule; the state is looked up at run time."""

    def choose(
        topk_ids: Tensor, topk_weights: Tensor, logits: Tensor, hidden: Tensor, layer: int
    ) -> Choice:
        state = active_state()
        if state is None:
            return topk_ids.clone(), topk_weights.clone()
        return state.choose(layer, topk_ids, topk_weights, logits, hidden)

    op = torch.library.custom_op(
        "sere_ray::choose",
        choose,
        mutates_args=(),
        schema="(Tensor topk_ids, Tensor topk_weights, Tensor logits, Tensor hidden, int layer) "
        "-> (Tensor, Tensor)",
    )
    op.register_fake(
        lambda topk_ids, topk_weights, logits, hidden, layer: (
            torch.empty_like(topk_ids),
            torch.empty_like(topk_weights),
        )
    )


def hide_llvmlite(original: Callable[..., Any], *args: Any) -> Any:
    """Call vLLM's search with llvmlite out of its sight."""
    hidden = {name: module for name, module in sys.modules.items() if name.startswith("llvmlite")}
    for name in hidden:
        del sys.modules[name]
    try:
        return original(*args)
    finally:
        sys.modules.update(hidden)


def _state_of_runner(runner: Any) -> CpuState | None:
    return cast(CpuState | None, find_state(runner.vllm_config))


def _run_step(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    state = _state_of_runner(runner)
    if state is None:
        return original(runner, *args, **kwargs)
    batch, count = runner.input_batch, runner.input_batch.num_reqs
    kinds = request_kinds(
        batch.num_computed_tokens_cpu[:count],
        batch.num_prompt_tokens[:count],
        batch.num_tokens_no_spec[:count],
    )
    for i, request in enumerate(batch.req_ids[:count]):
        if asks_exact(runner.requests[request].sampling_params):
            kinds[i] = EXACT
    starts = runner.query_start_loc.np[: count + 1]
    prompts = () if state.signatures is None else _prompts(batch, count, starts)
    with (
        counting(state.signatures, prompts),
        state.step(row_kinds(kinds, starts), draft_positions(kinds, starts)),
    ):
        return original(runner, *args, **kwargs)


def _prompts(batch: Any, count: int, starts: Any) -> list[PromptRows]:
    return prompt_rows(
        batch.req_ids[:count],
        batch.num_computed_tokens_cpu[:count],
        batch.num_prompt_tokens[:count],
        starts,
    )


def _run_dummy(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    state = _state_of_runner(runner)
    if state is None or state.union is None:
        return original(runner, *args, **kwargs)
    with state.step(np.zeros(0, dtype=np.int8)):  # all rows are padding
        return original(runner, *args, **kwargs)
