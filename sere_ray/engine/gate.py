"""Which gates give scores that rules can read: those that choose the K best of a softmax."""

from typing import Any

_ODD_FIELDS = (
    "use_grouped_topk",
    "custom_routing_function",
    "e_score_correction_bias",
    "_hash_indices_table",
)
"""Of vLLM's router for CPUs, which serves every kind of gate."""


def oddities(router: Any) -> list[str]:
    """What keeps a gate from being a plain softmax and top-k; empty: it is one.

    Args:
        router: vLLM's, of one layer, before its class is changed.
    """
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

    gate = type(router)
    odd = [] if gate in (CPURouter, FusedTopKRouter) else [f"router = {gate.__name__}"]
    for name in _ODD_FIELDS:
        value = getattr(router, name, None)
        if value is not None and value is not False:
            odd.append(name)
    if getattr(router, "scoring_func", "softmax") != "softmax":
        odd.append(f"scoring_func = {router.scoring_func}")
    return odd
