"""What the gates of an engine's layers rank experts by, read from vLLM's routers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sere_ray.policy.capabilities import GateFacts, check_gates
from sere_ray.policy.policy import Policy
from sere_ray.rules.gate import SCORINGS, Gate
from sere_ray.util.errors import UnsupportedError

_MAX_GROUPS = 32
"""Of a gate: the kernel holds a bit for each."""


def is_hashed(router: Any) -> bool:
    """Whether a table of token ids chooses experts, not scores: such layers stay exact."""
    return getattr(router, "_hash_indices_table", None) is not None


def read_gate(router: Any) -> Gate:
    """What a router ranks by.

    Args:
        router: vLLM's, of one layer, before its class is changed. Its bias may not be loaded yet:
            see :func:`with_bias`.

    Raises:
        UnsupportedError: says what it has that rules cannot read.
    """
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
        FusedTopKBiasRouter,
    )
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

    kinds = (CPURouter, FusedTopKRouter, FusedTopKBiasRouter, GroupedTopKRouter)
    if type(router) not in kinds:
        raise UnsupportedError(f"router = {type(router).__name__}")
    if getattr(router, "custom_routing_function", None) is not None:
        raise UnsupportedError("custom_routing_function")
    if router.scoring_func not in SCORINGS:
        raise UnsupportedError(f"scoring_func = {router.scoring_func}")
    experts, bias = router.global_num_experts, getattr(router, "e_score_correction_bias", None)
    grouped = isinstance(router, GroupedTopKRouter) or getattr(router, "use_grouped_topk", False)
    if not grouped and isinstance(router, CPURouter) and router.scoring_func == "softmax":
        bias = None  # vLLM's router on CPUs does not look at it
    num_groups, top_groups = (router.num_expert_group, router.topk_group) if grouped else (1, 1)
    if experts <= num_groups or experts % num_groups or top_groups >= num_groups:
        num_groups = 1
    if num_groups > _MAX_GROUPS:
        raise UnsupportedError(f"num_expert_group = {num_groups}, more than {_MAX_GROUPS}")
    return Gate(router.scoring_func, bias, experts // num_groups if num_groups > 1 else 0)


def with_bias(gate: Gate, router: Any) -> Gate:
    """The gate with its bias as it is now, on the host, less what is the same for all experts.

    That changes no order and no lead, but sums with a large bias would be less exact.

    Args:
        gate: of :func:`read_gate`.
        router: whose it is.
    """
    if gate.bias is None:
        return gate
    bias = router.e_score_correction_bias.detach().to(torch.float32)
    return replace(gate, bias=(bias - bias.max()).cpu().contiguous())


@dataclass
class Gates:
    """Those of an engine, by decoder layer index.

    Attributes:
        known: what rules can read.
        unknown: why rules cannot.
        exact: layers whose experts are chosen by a table, which no rule changes.
    """

    known: dict[int, Gate] = field(default_factory=dict)
    unknown: dict[int, str] = field(default_factory=dict)
    exact: set[int] = field(default_factory=set)

    def note(self, layer: int, router: Any) -> None:
        """Take note of a layer's gate.

        Args:
            layer: decoder layer index.
            router: vLLM's, before its class is changed.
        """
        if is_hashed(router):
            self.exact.add(layer)
            return
        self.known.pop(layer, None)
        try:
            self.known[layer] = read_gate(router)
        except UnsupportedError as odd:
            self.unknown[layer] = str(odd)

    def give_up(self, layer: int, reason: str) -> None:
        """Rules cannot read this layer's gate, for a reason that shows only now."""
        if self.known.pop(layer, None):
            self.unknown[layer] = reason

    def load(self, runners: Mapping[int, Any]) -> None:
        """Read the biases, once weights are loaded.

        Args:
            runners: decoder layer index -> vLLM's runner.
        """
        for layer, gate in self.known.items():
            if layer in runners:
                self.known[layer] = with_bias(gate, runners[layer].router)

    def is_plain(self, layer: int) -> bool:
        """Whether a layer's gate takes the K best of a softmax, and does nothing else."""
        return layer in self.known and self.known[layer].is_plain

    @property
    def facts(self) -> GateFacts:
        """What these gates keep policies from."""
        odd = [layer for layer, gate in self.known.items() if not gate.is_plain]
        return {
            "unknown": min(self.unknown.items(), default=None),
            "odd": min(odd, default=None),
            "hashed": min(self.exact, default=None),
        }

    def check(self, policy: Policy) -> None:
        """Refuse a policy that these gates keep an engine from running.

        Raises:
            UnsupportedError: names the layer and what its gate has.
        """
        check_gates(policy, self.facts)
