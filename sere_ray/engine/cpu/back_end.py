"""The back end of engines on a CPU."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sere_ray.dispatch import Greeting
from sere_ray.engine.back_end import Routing, Wrap, expert_kernel
from sere_ray.engine.checks import Checked
from sere_ray.engine.cpu import expert_parallel, patches
from sere_ray.engine.cpu.state import CpuState
from sere_ray.engine.cpu.union import UnionOfRanks
from sere_ray.engine.layer_checks import check_expert_kernel, check_input
from sere_ray.engine.placement import expert_owner
from sere_ray.engine.state import EngineState
from sere_ray.engine.timeout import group_timeout

logger = logging.getLogger("vllm.sere_ray")


def ask_for_tiles() -> None:
    """Ask Linux for the tile registers (AMX) of this CPU, if it has some.

    vLLM's experts for it compute with them without asking, and a process that has not asked ends
    with an illegal instruction. torch asks at its own first use, which may come later: an eager
    engine whose cache is given in bytes has none before its first request.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


class CpuBackEnd:
    """Re-routing by compiled loops, with vLLM's model runner V1."""

    def make_state(self, vllm_config: Any, checked: Checked, runner: Any) -> CpuState:
        """With tensor parallelism alone every rank sees every row, so no union is needed."""
        policy, startup, artifact, masks = checked
        logger.info("sere-ray: %s; CPU path", policy.model_dump_json())
        ask_for_tiles()
        top_k = vllm_config.model_config.get_num_experts_per_tok()
        max_rows = vllm_config.scheduler_config.max_num_batched_tokens
        union = None
        if vllm_config.parallel_config.data_parallel_size > 1:
            from vllm.distributed import get_ep_group

            ranks = get_ep_group()
            greeting = Greeting(ranks.cpu_group, group_timeout(vllm_config))
            union = UnionOfRanks(ranks.device_group, greeting, startup.check_ranks)
        return CpuState(
            policy, artifact, top_k, max_rows, startup=startup, masks=masks, union=union
        )

    def install(self, wrap: Wrap, vllm_config: Any) -> None:
        """Those of ``patches.py``, and the op that layers call."""
        patches.define_op()
        patches.install(wrap, across_ranks=vllm_config.parallel_config.enable_expert_parallel)

    def check_experts(self, state: EngineState, runner: Any) -> None:
        """All that are accepted here take a row as it is."""
        check_expert_kernel(runner, "cpu")

    def attach(self, state: EngineState, runner: Any, vllm_config: Any) -> None:
        """Under expert parallelism vLLM lacks something in each layer, and ranks own experts."""
        assert isinstance(state, CpuState)
        if vllm_config.parallel_config.enable_expert_parallel:
            expert_parallel.prepare_layer(runner, expert_kernel(runner))
            state.owner[runner.layer_id] = expert_owner(runner)
        state.note_gate(runner.layer_id, runner.router)
        if state.masks is not None:
            check_input(runner, state.masks.weights[1][runner.layer_id])

    @staticmethod
    def route(
        router: Any,
        original: Callable[..., Routing],
        hidden_states: Tensor,
        router_logits: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Routing:
        """The gate's choice, re-routed by the op ``sere_ray::choose``."""
        topk_weights, topk_ids = original(hidden_states, router_logits, *args, **kwargs)
        new_ids, new_weights = torch.ops.sere_ray.choose(
            topk_ids, topk_weights, router_logits, hidden_states, router.sere_layer
        )
        return new_weights, new_ids
