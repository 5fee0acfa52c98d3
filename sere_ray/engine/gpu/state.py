"""Re-routing on a GPU: one kernel launch per layer, in eager passes and in captured graphs alike.

Where vLLM's Triton experts sort the slots by expert right after routing, the launch does that
too and so replaces vLLM's two: :meth:`CudaState.defer` holds the layer's ids until then. In small
batches it also computes the gate's top-k: :meth:`CudaState.defer_routing` holds the logits.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.engine.state import EngineState, Routing
from sere_ray.kernel.launcher import (
    LOGIT_DTYPES,
    MAX_ALIGNED_ROWS,
    MAX_ROUTED_ROWS,
    Aligned,
    RuleKernel,
    blocks_of_margin,
    reads_logits,
)
from sere_ray.kernel.memory import DeviceLayer, LayerTables, Settings, StepInput
from sere_ray.policy.capabilities import check_policy
from sere_ray.policy.policy import Policy
from sere_ray.rules import RULES, RuleCounts
from sere_ray.util.errors import UnsupportedError

MAX_ROUTED_LOGITS = 4096
"""Most rows times experts of a batch whose top-k shares the launch: with more, one block chooses
more slowly than vLLM's many (`added_with_top_k_us` in docs/results/kernel-h200.json)."""


class Deferred(NamedTuple):
    """A layer whose ids are still the gate's, or not even chosen."""

    layer: int
    topk_ids: Tensor
    topk_weights: Tensor
    logits: Tensor | None = None
    chooses: bool = False
    """The ids are still to be chosen from the logits, as the fields below say."""
    is_padding: Tensor | None = None
    renormalize: bool = False


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
        self.settings = Settings(self.device, len(self.layers))
        self.step_input = StepInput(self.max_rows, self.device)
        shape = (2, len(self.layers), len(RuleCounts._fields))
        self.counters = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.deferred: Deferred | None = None
        self.without_scores: set[int] = set()
        self.exact_requests: set[str] = set()
        self.kernel(torch.int32).load(self.device, ("reroute", "reroute_and_align"))
        for logits in (torch.bfloat16, torch.float32):
            self.kernel(torch.int32, logits).load(self.device, ("route_and_align",))
        self.apply_policy()

    def kernel(
        self, id_dtype: torch.dtype, logit_dtype: torch.dtype = torch.bfloat16
    ) -> RuleKernel:
        """The kernel for ids of this type; where it chooses them, from logits of that type."""
        return RuleKernel(self.num_experts, self.top_k, id_dtype, logit_dtype=logit_dtype)

    def check_supported(self, policy: Policy) -> None:
        """See the base class."""
        check_policy(policy, on_gpu=True)
        self.check_scores(policy)

    def check_scores(self, policy: Policy) -> None:
        """Refuse a rule that reads scores which a gate here does not give.

        Raises:
            UnsupportedError: the gate has groups, a bias, another function than softmax, or logits
                of a type that the kernels do not read.
        """
        if RULES[policy.rule].needs_scores and self.without_scores:
            raise UnsupportedError(
                f"sere.rule = {policy.rule!r}: needs a gate that chooses the K best of a softmax "
                f"of {' or '.join(str(dtype) for dtype in LOGIT_DTYPES)}; that of layer "
                f"{min(self.without_scores)} does not; use rule = 'sere'"
            )

    def scores_of(self, layer: int, logits: Tensor, *, is_softmax: bool) -> Tensor | None:
        """A gate's logits, if rules can read scores from them.

        Args:
            layer: decoder layer.
            logits: ``[T, E]``.
            is_softmax: whether the gate chooses the K best of their softmax.

        Raises:
            UnsupportedError: they cannot, and the running rule does.
        """
        if is_softmax and reads_logits(logits):
            return logits
        self.without_scores.add(layer)
        self.check_scores(self.policy)
        return None

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
        reroutable = self.step_input.write(kinds, kind)
        self.settings.follow(reroutable)
        self.count_step(kind, reroutable, len(kinds))

    def begin_dummy_step(self) -> None:
        """The next pass computes nobody's rows: leave it alone."""
        self.step_input.clear()

    def reroute_inplace(
        self, layer: int, topk_ids: Tensor, topk_weights: Tensor, logits: Tensor | None = None
    ) -> None:
        """Apply the policy to one layer of the running step and count.

        Args:
            layer: decoder layer.
            topk_ids: ``[T, K]``.
            topk_weights: ``[T, K]``.
            logits: of :meth:`scores_of`.
        """
        kernel = self.kernel(topk_ids.dtype)
        kernel.reroute(
            topk_ids,
            topk_ids,
            topk_weights,
            self.layer(layer),
            logits=logits,
            blocks=self.blocks(topk_ids.shape[0]),
        )

    def defer(
        self, layer: int, topk_ids: Tensor, topk_weights: Tensor, logits: Tensor | None = None
    ) -> None:
        """Re-route when the experts sort these ids: :meth:`align`; as :meth:`reroute_inplace`."""
        if topk_ids.shape[0] > MAX_ALIGNED_ROWS:
            self.reroute_inplace(layer, topk_ids, topk_weights, logits)
        else:
            self.deferred = Deferred(layer, topk_ids, topk_weights, logits)

    def can_route(self, logits: Tensor) -> bool:
        """Whether :meth:`defer_routing` takes these logits, ``[T, E]``."""
        kernel, (rows, experts) = self.kernel(torch.int32, logits.dtype), logits.shape
        fits = rows <= MAX_ROUTED_ROWS and rows * experts <= MAX_ROUTED_LOGITS
        fits = fits and experts == self.num_experts
        return kernel.can_route and fits and logits.is_contiguous()

    def defer_routing(
        self, layer: int, logits: Tensor, is_padding: Tensor | None, *, renormalize: bool
    ) -> Routing:
        """Choose and re-route when the experts sort: :meth:`align` fills what this returns.

        Args:
            layer: decoder layer.
            logits: the gate's, ``[T, E]``.
            is_padding: ``[T]`` bool, rows that get ids of -1; None = none.
            renormalize: divide a row's weights by their sum.

        Returns:
            ``topk_weights`` float32 and ``topk_ids`` int32, ``[T, K]`` each, not yet written.
        """
        shape = (logits.shape[0], self.top_k)
        weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
        ids = torch.empty(shape, dtype=torch.int32, device=logits.device)
        self.deferred = Deferred(layer, ids, weights, logits, True, is_padding, renormalize)
        return weights, ids

    def align(
        self, topk_ids: Tensor, block_size: int, skips_foreign: bool = False
    ) -> Aligned | None:
        """Re-route the deferred ids in place and sort them; None if these are not deferred.

        Args:
            topk_ids: ``[T, K]``.
            block_size: rows of the expert GEMM's tile.
            skips_foreign: slots of other ranks' experts are left out. Here there are none.
        """
        held = self.deferred
        if held is None or held.topk_ids.data_ptr() != topk_ids.data_ptr():
            return None
        self.deferred = None
        if held.chooses and held.logits is not None:
            return self.kernel(topk_ids.dtype, held.logits.dtype).route_and_align(
                held.logits,
                topk_ids,
                held.topk_weights,
                self.layer(held.layer),
                is_padding=held.is_padding,
                renormalize=held.renormalize,
                block_size=block_size,
                blocks=self.blocks(topk_ids.shape[0]),
            )
        return self.kernel(topk_ids.dtype).reroute_and_align(
            topk_ids,
            topk_ids,
            held.topk_weights,
            self.layer(held.layer),
            block_size=block_size,
            logits=held.logits,
            blocks=self.blocks(topk_ids.shape[0]),
        )

    def blocks(self, rows: int) -> int:
        """Blocks of a launch: for the rule that runs now, so a graph keeps those of its capture.

        A cluster of blocks waits for as many free multiprocessors, so ``sere`` does without it.
        """
        return blocks_of_margin(rows, self.device) if self.policy.rule == "margin" else 1

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
        counters: NDArray[np.int64] = self.counters.to("cpu", copy=True).numpy()
        if reset:
            self.counters.zero_()
        if all(runner.moe_config.ep_size == 1 for runner in self.attached.values()):
            return np.concatenate([counters, counters[:, :, :2]], axis=2)  # each rank reads all
        return counters

    def layer(self, layer: int) -> DeviceLayer:
        """What a launch reads and writes of a decoder layer."""
        position = self.position[layer]
        counters, settings = self.counters[:, position], self.settings.buffer[position]
        return DeviceLayer(self.tables[layer], settings, self.step_input, counters)
