"""The rows of one rank, and how a layer is re-routed over them alone.

Where vLLM's Triton experts sort the slots by expert right after routing, the launch does that
too and so replaces vLLM's two: :meth:`OwnRows.defer` holds the layer's ids until then. In small
batches it also computes the gate's top-k: :meth:`OwnRows.defer_routing` holds the logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sere_ray.engine.gpu.device_rule import DeviceRule
from sere_ray.kernel.alignment import Aligned
from sere_ray.kernel.limits import MAX_ROUTED_ROWS
from sere_ray.kernel.memory import MASKED_COUNTERS, OWN_COUNTERS, DeviceLayer, StepInput

MAX_ROUTED_LOGITS = 4096
"""Most rows times experts of a batch whose top-k shares the launch: with more, one block chooses
more slowly than vLLM's many (`added_with_top_k_us` in docs/results/kernel-h200.json)."""


class Deferred(NamedTuple):
    """A layer whose ids are still the gate's, or not even chosen."""

    layer: int
    topk_ids: Tensor
    """``[T, K]``, re-routed in place."""
    topk_weights: Tensor
    """``[T, K]``."""
    sort: Callable[[int, bool], Aligned | None]
    """Re-routes and sorts the ids, given a block size and whether slots of other ranks' experts
    are left out; None where vLLM has to sort them."""
    logits: Tensor | None = None
    """``[T, E]``; this and what follows is read by tests that count again."""
    chooses: bool = False
    """The ids are still to be chosen from the logits."""
    renormalize: bool = False
    """The weights of a row are then divided by their sum."""
    mask_logits: Tensor | None = None
    """``[T, E]``, where there are masks."""


class OwnRows:
    """Row kinds and counters of one rank in device memory, never moved once made.

    Args:
        rule: of the engine.
        max_rows: most rows of a forward pass.
    """

    def __init__(self, rule: DeviceRule, max_rows: int) -> None:
        self.rule = rule
        self.step_input = StepInput(max_rows, rule.device)
        shape = (2, len(rule.tables), MASKED_COUNTERS if rule.has_masks else OWN_COUNTERS)
        self.counters = torch.zeros(shape, dtype=torch.int64, device=rule.device)

    def load(self) -> None:
        """Compile and load the kernels, before a graph is captured that launches them."""
        rule = self.rule
        rule.kernel(torch.int32).load(rule.device, ("reroute", "reroute_and_align"))
        for logits in (torch.bfloat16, torch.float32):
            rule.kernel(torch.int32, logits).load(rule.device, ("route_and_align",))

    def layer(self, layer: int) -> DeviceLayer:
        """What a launch over these rows reads and writes of a decoder layer."""
        return self.rule.of_layer(layer, self.step_input, self.counters)

    def reroute(
        self,
        layer: int,
        topk_ids: Tensor,
        topk_weights: Tensor,
        logits: Tensor | None,
        mask_logits: Tensor | None = None,
    ) -> None:
        """Apply the policy to one layer of the running step, in place, and count.

        Args:
            layer: decoder layer index.
            topk_ids: ``[T, K]``.
            topk_weights: ``[T, K]``.
            logits: ``[T, E]``, where rules can read scores from them.
            mask_logits: ``[T, E]``, where there are masks.
        """
        self.rule.kernel(topk_ids.dtype).reroute(
            topk_ids,
            topk_ids,
            topk_weights,
            self.layer(layer),
            logits=logits,
            mask_logits=mask_logits,
            blocks=self.rule.blocks(topk_ids.shape[0]),
        )

    def defer(
        self,
        layer: int,
        topk_ids: Tensor,
        topk_weights: Tensor,
        logits: Tensor | None,
        mask_logits: Tensor | None = None,
    ) -> Deferred:
        """Re-route when the experts sort.

        Args:
            layer: decoder layer index.
            topk_ids: ``[T, K]``, at most :func:`max_aligned_rows`.
            topk_weights: ``[T, K]``.
            logits: as for :meth:`reroute`.
            mask_logits: as for :meth:`reroute`.
        """

        def sort(block_size: int, skips_foreign: bool) -> Aligned:
            return self.rule.kernel(topk_ids.dtype).reroute_and_align(
                topk_ids,
                topk_ids,
                topk_weights,
                self.layer(layer),
                block_size=block_size,
                logits=logits,
                mask_logits=mask_logits,
                blocks=self.rule.blocks(topk_ids.shape[0]),
            )

        return Deferred(layer, topk_ids, topk_weights, sort, logits, mask_logits=mask_logits)

    def can_route(self, logits: Tensor) -> bool:
        """Whether :meth:`defer_routing` takes these logits, ``[T, E]``."""
        kernel, (rows, experts) = self.rule.kernel(torch.int32, logits.dtype), logits.shape
        fits = rows <= MAX_ROUTED_ROWS and rows * experts <= MAX_ROUTED_LOGITS
        fits = fits and experts == self.rule.num_experts
        return kernel.can_route and fits and logits.is_contiguous()

    def defer_routing(
        self,
        layer: int,
        logits: Tensor,
        is_padding: Tensor | None,
        mask_logits: Tensor | None = None,
        *,
        renormalize: bool,
    ) -> Deferred:
        """Choose and re-route when the experts sort.

        Args:
            layer: decoder layer index.
            logits: the gate's, ``[T, E]``.
            is_padding: ``[T]`` bool, rows that get ids of -1; None = none.
            mask_logits: as for :meth:`reroute`.
            renormalize: divide a row's weights by their sum.

        Returns:
            With weights float32 and ids int32 that are not yet written.
        """
        shape = (logits.shape[0], self.rule.top_k)
        weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
        ids = torch.empty(shape, dtype=torch.int32, device=logits.device)

        def sort(block_size: int, skips_foreign: bool) -> Aligned:
            return self.rule.kernel(ids.dtype, logits.dtype).route_and_align(
                logits,
                ids,
                weights,
                self.layer(layer),
                is_padding=is_padding,
                renormalize=renormalize,
                block_size=block_size,
                mask_logits=mask_logits,
                blocks=self.rule.blocks(ids.shape[0]),
            )

        return Deferred(layer, ids, weights, sort, logits, True, renormalize, mask_logits)
