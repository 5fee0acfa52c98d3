"""Launch ``kernels/cuda/across_ranks.cu``: the rule over rows of several ranks."""

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from sere_ray.kernel.alignment import Aligned, empty_alignment
from sere_ray.kernel.launcher import RuleKernel
from sere_ray.kernel.limits import max_aligned_rows
from sere_ray.kernel.memory import DeviceLayer
from sere_ray.kernel.peers import Peers

KERNELS = (
    "reroute_gathered",
    "reroute_gathered_and_align",
    "lowest_slot_orders",
    "reroute_by_slot_orders",
    "reroute_with_peers",
    "ask_of_ranks",
    "reroute_by_asked",
)
"""Kernels of ``across_ranks.cu``."""


class Placement(NamedTuple):
    """Which rank holds which expert, in device memory."""

    local_ids: Tensor
    """``[E]`` int32: index among this rank's experts, -1 for those of other ranks."""
    owner: Tensor
    """``[E]`` uint8: the rank that holds the expert."""
    num_ranks: int


def reroute_gathered(
    kernel: RuleKernel,
    topk_ids: Tensor,
    topk_weights: Tensor,
    layer: DeviceLayer,
    placement: Placement,
) -> None:
    """Re-route the rows of all ranks in place.

    Args:
        kernel: of the layer's shape.
        topk_ids: ``[T, K]`` contiguous, of all ranks in rank order.
        topk_weights: ``float32 [T, K]`` contiguous.
        layer: this layer's, with row kinds of all ranks and ``NUM_COUNTERS`` counters.
        placement: of the layer's experts.
    """
    arguments = kernel.arguments(topk_ids, topk_ids, topk_weights, layer)
    kernel.launch("reroute_gathered", topk_ids, arguments + _place(placement), early=False)


def reroute_gathered_and_align(
    kernel: RuleKernel,
    topk_ids: Tensor,
    topk_weights: Tensor,
    layer: DeviceLayer,
    placement: Placement,
    *,
    block_size: int,
) -> Aligned:
    """The same, and the slots of this rank's experts sorted; slots of other ranks are left out.

    Args:
        kernel: as for :func:`reroute_gathered`.
        topk_ids: ``[T, K]`` contiguous, at most :func:`max_aligned_rows` rows.
        topk_weights: as for :func:`reroute_gathered`.
        layer: as for :func:`reroute_gathered`.
        placement: as for :func:`reroute_gathered`.
        block_size: a power of two, rows of an expert GEMM's tile.

    Returns:
        ``block_expert`` holds local expert ids.
    """
    most_local = -(-kernel.num_experts // placement.num_ranks)
    most_rows = max_aligned_rows(kernel.num_experts, kernel.top_k)
    aligned, sorted_arguments = empty_alignment(topk_ids, block_size, most_local, most_rows)
    rule = kernel.arguments(topk_ids, topk_ids, topk_weights, layer)
    arguments = rule + _place(placement) + sorted_arguments
    kernel.launch("reroute_gathered_and_align", topk_ids, arguments, early=False)
    return aligned


def lowest_slot_orders(
    kernel: RuleKernel, topk_ids: Tensor, topk_weights: Tensor, layer: DeviceLayer, orders: Tensor
) -> None:
    """Steps 1 and 2 for the rows of this rank; equals :func:`sere_ray.rules.sere.slot_order_bytes`.

    Args:
        kernel: of the layer's shape.
        topk_ids: ``[T, K]`` contiguous, of this rank.
        topk_weights: ``float32 [T, K]`` contiguous.
        layer: this layer's, with row kinds of this rank.
        orders: ``[E]`` uint8, written. All 255 in a step that the rule leaves alone.
    """
    arguments = kernel.arguments(topk_ids, topk_ids, topk_weights, layer)
    kernel.launch("lowest_slot_orders", topk_ids, (*arguments, orders.data_ptr()))


def reroute_by_slot_orders(
    kernel: RuleKernel,
    topk_ids: Tensor,
    topk_weights: Tensor,
    layer: DeviceLayer,
    orders: Tensor,
    read: Tensor | None = None,
) -> None:
    """Steps 3 to 5 for the rows of this rank, in place.

    Args:
        kernel: of the layer's shape.
        topk_ids: ``[T, K]`` contiguous, of this rank.
        topk_weights: ``float32 [T, K]`` contiguous.
        layer: this layer's; experts are counted over all ranks, slots over these rows.
        orders: ``[E]`` uint8: the minimum over ranks of what :func:`lowest_slot_orders` wrote.
        read: ``[E]`` uint8, written: the experts that the rows of all ranks name afterwards; all 0
            in a step that the rule leaves alone. None = nobody asks.
    """
    arguments = kernel.arguments(topk_ids, topk_ids, topk_weights, layer)
    arguments = (*arguments, orders.data_ptr(), _address(read))
    kernel.launch("reroute_by_slot_orders", topk_ids, arguments, early=False)


def reroute_with_peers(
    kernel: RuleKernel,
    topk_ids: Tensor,
    topk_weights: Tensor,
    layer: DeviceLayer,
    peers: Peers,
    read: Tensor | None = None,
) -> None:
    """:func:`lowest_slot_orders`, their exchange and :func:`reroute_by_slot_orders` in one launch.

    A collective call: it waits for the same launch of every rank.

    Args:
        kernel: of the layer's shape.
        topk_ids: ``[T, K]`` contiguous, of this rank.
        topk_weights: ``float32 [T, K]`` contiguous.
        layer: this layer's; experts are counted over all ranks, slots over these rows.
        peers: whose inboxes this rank reaches.
        read: as for :func:`reroute_by_slot_orders`.
    """
    arguments = kernel.arguments(topk_ids, topk_ids, topk_weights, layer)
    arguments += (
        peers.inboxes.data_ptr(),
        peers.number.data_ptr(),
        np.int32(peers.rank),
        np.int32(len(peers.inboxes)),
        np.int64(peers.patience_ns),
        _address(read),
    )
    kernel.launch("reroute_with_peers", topk_ids, arguments)


def ask_of_ranks(
    kernel: RuleKernel,
    topk_ids: Tensor,
    topk_weights: Tensor,
    layer: DeviceLayer,
    logits: Tensor,
    asked: Tensor,
) -> None:
    """The first half of ``margin`` and ``spare``; equals ``ask()`` of their modules in ``rules``.

    Args:
        kernel: of the layer's shape.
        topk_ids: ``[T, K]`` contiguous, of this rank.
        topk_weights: ``float32 [T, K]`` contiguous.
        layer: this layer's, with row kinds of this rank.
        logits: as for :meth:`RuleKernel.reroute`, of this rank.
        asked: ``[E]`` int64, written. All 0 in a step that the rule leaves alone.
    """
    arguments = kernel.arguments(topk_ids, topk_ids, topk_weights, layer)
    arguments += kernel.logit_arguments(logits, layer.gate)
    kernel.launch("ask_of_ranks", topk_ids, (*arguments, asked.data_ptr()))


def reroute_by_asked(
    kernel: RuleKernel,
    topk_ids: Tensor,
    topk_weights: Tensor,
    layer: DeviceLayer,
    logits: Tensor,
    asked: Tensor,
    owner: Tensor | None = None,
    read: Tensor | None = None,
) -> None:
    """The second half for the rows of this rank, in place; arguments as :func:`ask_of_ranks`.

    Args:
        kernel: see there.
        topk_ids: see there.
        topk_weights: see there; changed in place.
        layer: experts are counted over all ranks, slots over these rows.
        logits: see there.
        asked: ``[E]`` int64: the sum over ranks of what :func:`ask_of_ranks` wrote.
        owner: ``[E]`` uint8, the rank that holds each expert, on the device. Without it
            ``balance_ranks`` must not be set.
        read: as for :func:`reroute_by_slot_orders`.
    """
    arguments = kernel.arguments(topk_ids, topk_ids, topk_weights, layer)
    arguments += kernel.logit_arguments(logits, layer.gate)
    arguments += (asked.data_ptr(), _address(owner), _address(read))
    kernel.launch("reroute_by_asked", topk_ids, arguments, early=False)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _place(placement: Placement) -> tuple[Any, ...]:
    return (
        placement.local_ids.data_ptr(),
        placement.owner.data_ptr(),
        np.int32(placement.num_ranks),
    )
