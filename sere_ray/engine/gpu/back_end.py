"""The back end of engines on a GPU."""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sere_ray.engine.back_end import Routing, Wrap
from sere_ray.engine.checks import Checked
from sere_ray.engine.gpu import patches, routing, union_patches
from sere_ray.engine.gpu.copies import choose_copies
from sere_ray.engine.gpu.mask_router import check_stackable
from sere_ray.engine.gpu.ranks import ranks_of_engine
from sere_ray.engine.gpu.state import CudaState
from sere_ray.engine.layer_checks import check_expert_kernel, check_input, check_shards
from sere_ray.engine.state import EngineState

logger = logging.getLogger("vllm.sere_ray")


class GpuBackEnd:
    """Re-routing by one launch a layer, with vLLM's model runner V2."""

    def make_state(self, vllm_config: Any, checked: Checked, runner: Any) -> CudaState:
        """On the current device; with data parallelism it meets the other ranks later."""
        policy, startup, artifact, masks = checked
        device = torch.device("cuda", torch.cuda.current_device())
        logger.info("sere-ray: %s; CUDA kernel on %s", policy.model_dump_json(), device)
        model, num_experts = vllm_config.model_config, vllm_config.model_config.get_num_experts()
        ranks = None
        if vllm_config.parallel_config.data_parallel_size > 1:
            ranks = ranks_of_engine(vllm_config, num_experts, device, runner.moe_config.sp_size)
        state = CudaState(
            policy,
            artifact,
            model.get_num_experts_per_tok(),
            num_experts,
            vllm_config.scheduler_config.max_num_batched_tokens,
            device,
            startup=startup,
            decoder_layers=model.hf_text_config.num_hidden_layers,
            masks=masks,
            ranks=ranks,
        )
        if state.versions is not None and vllm_config.parallel_config.tensor_parallel_size > 1:
            from vllm.distributed.parallel_state import get_tp_group

            state.versions.check_alike(get_tp_group().cpu_group)
        return state

    def install(self, wrap: Wrap, vllm_config: Any) -> None:
        """Those of ``patches.py``, with data parallelism those of ``union_patches.py``, too."""
        patches.install(wrap)
        if vllm_config.parallel_config.data_parallel_size > 1:
            union_patches.install(wrap)

    def check_experts(self, state: EngineState, runner: Any) -> None:
        """Whether slots are merged follows from the kernel, for all layers alike."""
        assert isinstance(state, CudaState)
        merges = check_expert_kernel(runner, "cuda")
        state.rule.note_experts(runner.layer_name, merges=merges)

    def attach(self, state: EngineState, runner: Any, vllm_config: Any) -> None:
        """The router finds its state and its layer's kernels, which are made after loading."""
        from sere_ray.engine.gpu.gate_up_fp8 import arrivals

        assert isinstance(state, CudaState)
        check_shards(runner, 1 if state.ranks is None else state.ranks.shards)
        arrivals(state.device)  # no graph is captured yet
        router = runner.router
        router.sere_state, router.sere_runner = state, weakref.ref(runner)
        state.note_gate(router.sere_layer, router)
        if state.masks is not None:
            check_input(runner, state.masks.weights[1][runner.layer_id])
            check_stackable(runner)
        if state.startup.replicas == "by_experts":
            choose_copies(router, state)

    @staticmethod
    def route(
        router: Any,
        original: Callable[..., Routing],
        hidden_states: Tensor,
        router_logits: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Routing:
        """In every eager pass, and once for each captured graph: a layer is opaque to Dynamo."""
        route = routing.route if router.sere_state.union is None else routing.route_among_ranks
        return route(router, original, hidden_states, router_logits, *args, **kwargs)
