"""Compile, load and launch the kernels; ``memory.py`` has what they read and write."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sere_ray.kernel.alignment import Aligned, empty_alignment
from sere_ray.kernel.compiler import compile_cubin
from sere_ray.kernel.limits import (
    FILES,
    LOGIT_DTYPES,
    MAX_ROUTED_ROWS,
    MAX_ROUTED_TOP_K,
    check_shape,
    max_aligned_rows,
)
from sere_ray.kernel.logits import check_routable, logit_arguments, mask_arguments
from sere_ray.kernel.memory import STEP, DeviceLayer, power_of_two
from sere_ray.rules.gate import Gate
from sere_ray.util.errors import UnsupportedError


@dataclass(frozen=True)
class RuleKernel:
    """The compiled rule for layers of one shape, on one device.

    Attributes:
        num_experts: E.
        top_k: K.
        id_dtype: int32 or int64.
        logit_dtype: of the gate's logits, for :meth:`route_and_align`.
        any_gate: whether layers may have gates that are not plain, see :class:`Gate`.
        masks: whether learned masks may come before the rule: then a layer has ``MASKED_COUNTERS``
            counters. Not for kernels of several ranks.
    """

    num_experts: int
    top_k: int
    id_dtype: torch.dtype
    logit_dtype: torch.dtype = torch.bfloat16
    any_gate: bool = False
    masks: bool = False

    def __post_init__(self) -> None:
        """Refuse shapes that the kernel does not hold in a block."""
        check_shape(self.num_experts, self.top_k)

    @property
    def can_route(self) -> bool:
        """Whether :meth:`route_and_align` takes this shape."""
        power = self.num_experts == power_of_two(self.num_experts)
        logits = self.logit_dtype in LOGIT_DTYPES
        return power and 32 <= self.num_experts <= 256 and self.top_k <= MAX_ROUTED_TOP_K and logits

    def defines(self, name: str, threads: int) -> dict[str, int]:
        """Constants of the file that holds a kernel."""
        constants = {
            "E": self.num_experts,
            "K": self.top_k,
            "THREADS": threads,
            "MAX_ROWS": max_aligned_rows(self.num_experts, self.top_k),
            "ANY_GATE": int(self.any_gate),
            "ID64": int(self.id_dtype == torch.int64),
            "MASKS": int(self.masks),
        }
        if FILES[name] == "route.cu":
            size = self.logit_dtype.itemsize
            constants |= {"MAX_ROWS": MAX_ROUTED_ROWS, "LOGIT_BYTES": size}
        return constants

    def threads(self, name: str, rows: int) -> int:
        """Threads of the block: two sizes, so that two modules serve every batch."""
        lanes = power_of_two(self.top_k)
        if name == "route_and_align":
            lanes = max(1, min(self.num_experts * self.logit_dtype.itemsize // 16, 32))
        return 512 if rows * lanes <= 512 else 1024

    def load(self, device: torch.device, names: Iterable[str]) -> None:
        """Compile and load kernels before a graph is captured that launches them."""
        for name in names:
            if name != "route_and_align" or self.can_route:
                for threads in (512, 1024):
                    _function(self, threads, device.index or 0, name)

    def reroute(
        self,
        topk_ids: Tensor,
        new_ids: Tensor,
        topk_weights: Tensor,
        layer: DeviceLayer,
        *,
        logits: Tensor | None = None,
        mask_logits: Tensor | None = None,
        blocks: int = 1,
    ) -> None:
        """Write the re-routed ids to ``new_ids``; in place where that is ``topk_ids``.

        Args:
            topk_ids: ``[T, K]`` contiguous.
            new_ids: ``[T, K]`` contiguous.
            topk_weights: ``float32 [T, K]`` contiguous; rules of demand change them in place.
            layer: this layer's.
            logits: ``[T, E]`` of the gate, bfloat16 or float32, contiguous. Without them the
                rules of demand, ``margin`` and ``spare``, must not be set.
            mask_logits: ``[T, E]`` of the layer's mask router, as ``logits``: a slot whose expert
                has less than 0 is masked. For kernels with ``masks``, and only for them.
            blocks: of the launch, see :func:`blocks_of_margin`. Any number is right under either
                rule, and a captured graph keeps its own: under ``sere`` all but one end at once.
        """
        arguments = self.arguments(topk_ids, new_ids, topk_weights, layer)
        arguments += self.logit_arguments(logits, layer.gate)
        arguments += mask_arguments(mask_logits, self.num_experts, takes=self.masks)
        self.launch("reroute", topk_ids, arguments, blocks=blocks)

    def reroute_and_align(
        self,
        topk_ids: Tensor,
        new_ids: Tensor,
        topk_weights: Tensor,
        layer: DeviceLayer,
        *,
        block_size: int,
        logits: Tensor | None = None,
        mask_logits: Tensor | None = None,
        blocks: int = 1,
    ) -> Aligned:
        """Re-route and sort the slots by their new expert, in the same launch.

        Args:
            topk_ids: ``[T, K]`` contiguous, at most :func:`max_aligned_rows`.
            new_ids: as for :meth:`reroute`.
            topk_weights: as for :meth:`reroute`.
            layer: as for :meth:`reroute`.
            block_size: a power of two, rows of an expert GEMM's tile.
            logits: as for :meth:`reroute`.
            mask_logits: as for :meth:`reroute`.
            blocks: as for :meth:`reroute`.

        Raises:
            ValueError: of :func:`empty_alignment`.
        """
        most_rows = max_aligned_rows(self.num_experts, self.top_k)
        aligned, sorted_arguments = empty_alignment(
            topk_ids, block_size, self.num_experts, most_rows
        )
        arguments = self.arguments(topk_ids, new_ids, topk_weights, layer)
        arguments += self.logit_arguments(logits, layer.gate) + sorted_arguments
        arguments += mask_arguments(mask_logits, self.num_experts, takes=self.masks)
        self.launch("reroute_and_align", topk_ids, arguments, blocks=blocks)
        return aligned

    def route_and_align(
        self,
        logits: Tensor,
        new_ids: Tensor,
        topk_weights: Tensor,
        layer: DeviceLayer,
        *,
        is_padding: Tensor | None,
        renormalize: bool,
        block_size: int,
        mask_logits: Tensor | None = None,
        blocks: int = 1,
    ) -> Aligned:
        """Softmax and top-k of the gate, the rule, and the sorted slots, in one launch.

        Args:
            logits: ``[T, E]`` of ``logit_dtype``, contiguous, at most ``MAX_ROUTED_ROWS`` rows.
            new_ids: ``[T, K]``, written.
            topk_weights: ``float32 [T, K]``, written: bit for bit what vLLM's top-k kernel gives,
                but for rows that a rule of demand changes.
            layer: as for :meth:`reroute`.
            is_padding: ``[T]`` bool, rows that get ids of -1; None = none.
            renormalize: divide a row's weights by their sum.
            block_size: as for :meth:`reroute_and_align`.
            mask_logits: as for :meth:`reroute`, of ``logit_dtype``.
            blocks: as for :meth:`reroute`.

        Raises:
            ValueError: a tensor does not fit.
        """
        check_routable(logits, mask_logits, self.logit_dtype, can_route=self.can_route)
        aligned, sorted_arguments = empty_alignment(
            new_ids, block_size, self.num_experts, MAX_ROUTED_ROWS
        )
        rule = self.arguments(new_ids, new_ids, topk_weights, layer)
        routing = (
            logits.data_ptr(),
            is_padding.data_ptr() if is_padding is not None else 0,
            np.int32(renormalize),
            topk_weights.data_ptr(),
            0,  # there are no ids yet
        )
        arguments = routing + rule[1:] + sorted_arguments
        arguments += mask_arguments(mask_logits, self.num_experts, takes=self.masks)
        self.launch("route_and_align", new_ids, arguments, blocks=blocks)
        return aligned

    def arguments(
        self,
        topk_ids: Tensor,
        new_ids: Tensor,
        topk_weights: Tensor,
        layer: DeviceLayer,
    ) -> tuple[Any, ...]:
        """What every kernel takes first; arguments as for :meth:`reroute`.

        Raises:
            ValueError: a tensor does not fit.
        """
        for name, tensor, dtype in (
            ("topk_ids", topk_ids, self.id_dtype),
            ("new_ids", new_ids, self.id_dtype),
            ("topk_weights", topk_weights, torch.float32),
        ):
            if tensor.dtype != dtype or not tensor.is_contiguous() or not tensor.is_cuda:
                raise ValueError(
                    f"{name} must be a contiguous {dtype} CUDA tensor, got {tensor.dtype} "
                    f"{tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
                )
        step_address = layer.step.buffer.data_ptr()
        return (
            topk_ids.data_ptr(),
            new_ids.data_ptr(),
            topk_weights.data_ptr(),
            np.int32(topk_ids.shape[0]),
            layer.tables.neighbours.data_ptr(),
            layer.tables.similarity.data_ptr(),
            layer.tables.stand_ins.data_ptr(),
            layer.tables.stand_in_of.data_ptr(),
            layer.settings.data_ptr(),
            step_address,
            step_address + STEP.size,
            layer.counters.data_ptr(),
            np.int32(layer.counters.stride(0)),
        )

    def logit_arguments(self, logits: Tensor | None, gate: Gate) -> tuple[Any, ...]:
        """What kernels with rules of demand take for the logits of :meth:`reroute`."""
        return logit_arguments(logits, gate, num_experts=self.num_experts, any_gate=self.any_gate)

    def launch(
        self,
        name: str,
        topk_ids: Tensor,
        arguments: tuple[Any, ...],
        *,
        early: bool = True,
        blocks: int = 1,
    ) -> None:
        """Launch a kernel of ``FILES`` on the current stream.

        Args:
            name: of the kernel.
            topk_ids: ``[T, K]``, whose rows the launch has to hold and on whose device it runs.
            arguments: in the kernel's order.
            early: whether it may start while the kernel before it still runs.
            blocks: as for :meth:`reroute`.
        """
        from cuda.core import Stream, launch

        rows, device = topk_ids.shape[0], topk_ids.device.index
        threads = self.threads(name, rows)
        stream = Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
        config = _config(threads, blocks, early)
        launch(stream, config, _function(self, threads, device, name), *arguments)


@cache
def _config(threads: int, blocks: int, early: bool) -> Any:
    from cuda.core import LaunchConfig

    # Programmatic: may start while the gate's top-k kernel still runs; see rule.cuh. Not behind a
    # collective, which never lets a kernel start early.
    return LaunchConfig(
        grid=1,
        cluster=blocks if blocks > 1 else None,
        block=threads,
        programmatic_stream_serialization=early,
    )


@cache
def _function(kernel: RuleKernel, threads: int, device: int, name: str) -> Any:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise UnsupportedError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; the "
            "CUDA kernel needs 8.0 or higher (A100, L4, H100 ...)"
        )
    cubin = compile_cubin(FILES[name], kernel.defines(name, threads), f"sm_{major}{minor}")
    from cuda.core import Device, ObjectCode

    Device(device).set_current()
    return ObjectCode.from_cubin(cubin).get_kernel(name)
