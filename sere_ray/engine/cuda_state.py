"""Re-routing on a GPU: one kernel launch per layer, in eager passes and in captured graphs alike.

Where vLLM's Triton experts sort the slots by expert right after routing, the launch does that
too and so replaces vLLM's two: :meth:`CudaState.defer` holds the layer's ids until then.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.engine.state import EngineState
from sere_ray.errors import UnsupportedError
from sere_ray.kernel.launcher import (
    MAX_ALIGNED_ROWS,
    Aligned,
    DeviceLayer,
    LayerTables,
    RuleKernel,
    Settings,
    StepInput,
)
from sere_ray.rules import RuleCounts


class Deferred(NamedTuple):
    """A layer whose ids are still the gate's."""

    layer: int
    topk_ids: Tensor
    topk_weights: Tensor


@dataclass
class CudaState(EngineState):
    """Tables, settings, row kinds and counters in device memory, never moved once made.

    Attributes:
        num_experts: E, logical experts.
        max_rows: most rows of a forward pass.
        device: of this worker.
    """

    num_experts: int
    max_rows: int
    device: torch.device

    def __post_init__(self) -> None:
        """Allocate everything graphs will point to; compile the kernel."""
        super().__post_init__()
        self.tables = {
            layer: LayerTables.build(self.artifact.layers[layer], self.device)
            for layer in self.layers
        }
        self.settings = Settings(self.device)
        self.step_input = StepInput(self.max_rows, self.device)
        shape = (2, len(self.layers), len(RuleCounts._fields))
        self.counters = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.deferred: Deferred | None = None
        self.exact_requests: set[str] = set()
        self.kernel(torch.int32).load(self.device)
        self.apply_policy()

    def kernel(self, id_dtype: torch.dtype) -> RuleKernel:
        """The kernel for ids of this type."""
        return RuleKernel(self.num_experts, self.top_k, id_dtype)

    def apply_policy(self) -> None:
        """Copy the policy's numbers to the device, behind every step launched so far."""
        self.settings.write(self.bound, top_k=self.top_k, num_experts=self.num_experts)

    def apply_artifact(self) -> None:
        """Copy the matrices to where captured graphs read them, behind every step launched."""
        for layer, tables in self.tables.items():
            new = LayerTables.build(self.artifact.layers[layer], self.device)
            for old_values, values in zip(tables, new, strict=True):
                old_values.copy_(values)

    def begin_step(self, kinds: NDArray[np.int8]) -> None:
        """Row kinds of the pass that is launched next on this stream.

        Args:
            kinds: ``[rows]`` int8; rows of the pass beyond it are padding.
        """
        kind = self.step_kind(kinds)
        self.count_step(kind, self.step_input.write(kinds, kind))

    def begin_dummy_step(self) -> None:
        """The next pass computes nobody's rows: leave it alone."""
        self.step_input.clear()

    def reroute_inplace(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """Apply the policy to one layer of the running step and count."""
        kernel = self.kernel(topk_ids.dtype)
        kernel.reroute(topk_ids, topk_ids, topk_weights, self.layer(layer))

    def defer(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """Re-route when the experts sort these ids: :meth:`align`."""
        if topk_ids.shape[0] > MAX_ALIGNED_ROWS:
            self.reroute_inplace(layer, topk_ids, topk_weights)
        else:
            self.deferred = Deferred(layer, topk_ids, topk_weights)

    def align(self, topk_ids: Tensor, block_size: int) -> Aligned | None:
        """Re-route the deferred ids in place and sort them; None if these are not deferred."""
        held = self.deferred
        if held is None or held.topk_ids.data_ptr() != topk_ids.data_ptr():
            return None
        self.deferred = None
        return self.kernel(topk_ids.dtype).reroute_and_align(
            topk_ids, topk_ids, held.topk_weights, self.layer(held.layer), block_size=block_size
        )

    def check_nothing_deferred(self) -> None:
        """Whatever was deferred must have been sorted: else experts ran on the gate's ids.

        Raises:
            UnsupportedError: this vLLM sorts elsewhere.
        """
        if self.deferred is not None:
            raise UnsupportedError(
                f"sere: layer {self.deferred.layer} was computed without re-routing: vLLM's "
                "experts did not sort its ids where this version expects it; report this with "
                "the model's name"
            )

    def read_device_counters(self, *, reset: bool) -> NDArray[np.int64]:
        """See the base class; waits for the device."""
        counters: NDArray[np.int64] = self.counters.cpu().numpy()
        if reset:
            self.counters.zero_()
        return counters

    def layer(self, layer: int) -> DeviceLayer:
        """What a launch reads and writes of a decoder layer."""
        counters = self.counters[:, self.position[layer]]
        return DeviceLayer(self.tables[layer], self.settings, self.step_input, counters)
