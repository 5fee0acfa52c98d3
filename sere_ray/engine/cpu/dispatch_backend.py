"""The all-to-all as a back end of vLLM's MoE kernels.

Imports vLLM, so it is imported where an engine asks for it, not before.
"""

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
)
from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input

from sere_ray.dispatch import AllToAll, Sent
from sere_ray.engine.cpu.dispatch import DispatchMeter


class AllToAllPrepareAndFinalize(mk.FusedMoEPrepareAndFinalizeModular):  # type: ignore[misc]
    """Rows of one layer to the ranks of their experts, and the sums back."""

    def __init__(self, exchange: AllToAll, meter: DispatchMeter) -> None:
        super().__init__()
        self.exchange, self.meter = exchange, meter
        self.sent: Sent | None = None
        experts = torch.arange(len(exchange.owner), device=exchange.owner.device)
        self.foreign_id = int(experts[exchange.owner != exchange.rank].min())
        """An expert that does not live here: kernels drop it, and not all of them know -1."""

    @property
    def activation_format(self) -> mk.FusedMoEActivationFormat:
        """``[rows, H]``."""
        return mk.FusedMoEActivationFormat.Standard

    def max_num_tokens_per_rank(self) -> int | None:
        """No limit."""
        return None

    def topk_indices_dtype(self) -> torch.dtype | None:
        """Any integer."""
        return None

    def num_dispatchers(self) -> int:
        """Ranks that send rows."""
        return self.exchange.ranks

    def output_is_reduced(self) -> bool:
        """Sums come back whole."""
        return True

    def prepare(
        self,
        a1: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool,
    ) -> mk.PrepareResultType:
        """Send rows as they are; a quantised kernel's input is quantised where it arrives."""
        if apply_router_weight_on_input:
            assert topk_ids.shape[1] == 1, "weights on the input: one expert per row only"
            a1 = a1 * topk_weights.to(a1.dtype)
        routed = self.meter.take_routed()
        gate_ids = None
        if routed is not None:
            padding = routed.is_padding.unsqueeze(1)
            topk_ids, gate_ids = (
                ids.masked_fill(padding, -1) for ids in (topk_ids, routed.gate_ids)
            )
        arrived, self.sent = self.exchange.dispatch(a1, topk_ids, topk_weights, gate_ids)
        self.meter.add(routed, self.sent.counts)
        rows, scale = arrived.hidden_states, None
        if not defer_input_quant:
            rows, scale = moe_kernel_quantize_input(
                rows,
                quant_config.a1_gscale if quant_config.use_nvfp4_w4a4 else quant_config.a1_scale,
                quant_dtype=quant_config.quant_dtype,
                per_act_token_quant=quant_config.per_act_token_quant,
                block_shape=quant_config.block_shape,
                is_scale_swizzled=quant_config.is_scale_swizzled,
                mx_alignment=quant_config.mx_alignment,
            )
        ids = arrived.topk_ids
        ids = ids.masked_fill(ids < 0, self.foreign_id).to(topk_ids.dtype)
        return rows, scale, None, ids, arrived.topk_weights.to(topk_weights.dtype)

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: mk.TopKWeightAndReduce,
    ) -> None:
        """Reduce each row over the experts here, send it back once, add up what comes back."""
        assert self.sent is not None, "finalize without prepare"
        sent, self.sent = self.sent, None
        if isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            weight_and_reduce_impl = TopKWeightAndReduceContiguous()
        partial = weight_and_reduce_impl.apply(
            output=None,
            fused_expert_output=fused_expert_output,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            apply_router_weight_on_input=apply_router_weight_on_input,
        )
        output.copy_(self.exchange.combine(partial, sent))
