"""Recorded experts (vLLM's ``enable_return_routed_experts``): those after the rule, distinct.

vLLM calls a router's ``capture_fn`` with the ids that the router returns, before the load
balancer's map; those are re-routed here. What a trainer may conclude from them stands in
docs/serve.md, "Recorded experts".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sere_ray.engine.checks import sere_config
from sere_ray.rules.merging import DROPPED


def distinct(topk_ids: Tensor) -> Tensor:
    """The ids of a row once each: where the row names an expert again, -1.

    Most expert kernels take rows that name an expert twice and are handed them as they are; a
    trainer that sums over the ids of a row would count such an expert twice.

    Args:
        topk_ids: ``[T, K]``, negative ones are sentinels.

    Returns:
        New ids of the same dtype. Of slots with the same expert the first one keeps it.
    """
    same = topk_ids[:, :, None] == topk_ids[:, None, :]
    return topk_ids.masked_fill(same.tril(diagonal=-1).any(dim=-1), DROPPED)


def recording_distinct(capture: Callable[[Tensor], None] | None) -> Callable[[Tensor], None] | None:
    """What a router calls in the place of vLLM's ``capture``; None = nothing is recorded."""
    return None if capture is None else lambda topk_ids: capture(distinct(topk_ids))


def tell_dropped_apart(
    original: Callable[..., None], capturer: Any, *args: Any, **kwargs: Any
) -> None:
    """``RoutedExpertsCapturer.__init__``: -1 is recorded as the largest number of its type.

    With exactly 256 experts vLLM takes 8 bits, in which that number is an expert; then 16.
    """
    original(capturer, *args, **kwargs)
    vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[1]
    if sere_config(vllm_config) is not None and vllm_config.model_config.get_num_experts() == 256:
        capturer.output_dtype_name, capturer.output_dtype = "uint16", torch.uint16
