"""``dispatch: all_to_all`` in an engine: put in place after loading, fed and counted per layer.

=====================================  ==========================================================
target                                 what, why, remove when
=====================================  ==========================================================
quant_method.moe_kernel of each layer  Built again of the same experts and the back end of
                                       ``dispatch_backend.py``, once weights are loaded. Why:
                                       vLLM makes back ends from a closed list of names
                                       (``maybe_make_prepare_finalize``). Remove: it can be given
                                       one.
=====================================  ==========================================================
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sere_ray.dispatch import DISPATCH_COUNTS, AllToAll, Greeting
from sere_ray.engine.counters import KIND_NAMES
from sere_ray.engine.cpu.sent import Counter
from sere_ray.rules import PADDING
from sere_ray.util.errors import UnsupportedError


class Routed(NamedTuple):
    """Rows of one layer of the running step, between the rule and their dispatch."""

    gate_ids: Tensor
    """``[T, K]``, before the rule."""
    is_padding: Tensor
    """``[T]`` bool: rows nobody asked for, which stay where they are."""
    counter: Counter | None
    """What the call is counted under; None = it is not counted."""


@dataclass
class DispatchMeter:
    """Hands rows' origin from the rule to the dispatch of the same layer, and adds up counts.

    Attributes:
        num_layers: MoE layers of the model.
    """

    num_layers: int
    ranks: int = field(default=0, init=False)
    row_bytes: dict[str, int] = field(default_factory=dict, init=False)
    routed: Routed | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Start at zero."""
        shape = (2, self.num_layers, len(DISPATCH_COUNTS))
        self.counts = torch.zeros(shape, dtype=torch.int64, device="cpu")
        self.calls = np.zeros((2, self.num_layers), dtype=np.int64)

    def begin_layer(self, gate_ids: Tensor, row_kind: Tensor, counter: Counter | None) -> None:
        """Keep what the dispatch of this layer's rows asks for: :meth:`take_routed`.

        Args:
            gate_ids: ``[T, K]``, before the rule.
            row_kind: ``[T]`` int8.
            counter: what is counted under; None = it is not counted.
        """
        self.routed = Routed(gate_ids, row_kind == PADDING, counter)

    def take_routed(self) -> Routed | None:
        """What the rule of this layer left, once; None outside a step (warm-up, drafts)."""
        routed, self.routed = self.routed, None
        return routed

    def add(self, routed: Routed | None, counts: Tensor) -> None:
        """Count a call; ``counts`` as :data:`DISPATCH_COUNTS`, on the device."""
        if routed is not None and routed.counter is not None:
            self.counts[routed.counter] += counts
            self.calls[routed.counter] += 1

    def add_gathered(self, size: int) -> None:
        """Nothing: no row is gathered."""

    def read_bytes(self) -> list[dict[str, list[int] | None]]:
        """Of the rows that were sent to other ranks, not of the sums that came back."""
        row = self.row_bytes["dispatch"]
        return [
            {
                f"bytes_dispatched_{when}": [n * row for n in of_kind[f"rows_sent_{when}"]]
                for when in ("before", "after")
            }
            for of_kind in self._read()
        ]

    def add_to_report(self, report: dict[str, Any]) -> None:
        """Add ``"dispatch"``, what was moved.

        At the top ``ranks`` and ``row_bytes``; under each step kind sums by layer: ``calls`` and
        every field of ``DISPATCH_COUNTS``, of the steps that the kind's other counters count.
        """
        report["dispatch"] = {"ranks": self.ranks, "row_bytes": self.row_bytes}
        for name, of_kind in zip(KIND_NAMES, self._read(), strict=True):
            report[name]["dispatch"] = of_kind

    def _read(self) -> list[dict[str, Any]]:
        sums = self.counts.cpu().numpy()
        return [
            {"calls": self.calls[kind].tolist()}
            | dict(zip(DISPATCH_COUNTS, sums[kind].T.tolist(), strict=True))
            for kind in range(2)
        ]

    def reset(self) -> None:
        """Count from zero again."""
        self.counts.zero_()
        self.calls[:] = 0


def replace_dispatch(
    layers: Mapping[int, Any],
    owners: Mapping[int, Tensor],
    meter: DispatchMeter,
    group: dist.ProcessGroup,
    greeting: Greeting | None,
) -> None:
    """Take vLLM's all-gather out of each layer's kernel and put the all-to-all in.

    Args:
        layers: decoder layer index -> vLLM's ``MoERunner``, weights loaded.
        owners: decoder layer index -> ``[E]`` int64, expert-parallel rank of every expert.
        meter: of the engine.
        group: of the expert-parallel ranks.
        greeting: see :class:`AllToAll`.

    Raises:
        UnsupportedError: a layer does not dispatch by vLLM's all-gather.
    """
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
    from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import (
        MoEPrepareAndFinalizeNaiveDPEPModular,
    )

    from sere_ray.engine.cpu.dispatch_backend import AllToAllPrepareAndFinalize

    for layer, runner in layers.items():
        method, moe = runner.routed_experts.quant_method, runner.moe_config
        stock = getattr(method.moe_kernel, "prepare_finalize", None)
        if type(stock) is not MoEPrepareAndFinalizeNaiveDPEPModular:
            raise UnsupportedError(
                f"sere.dispatch = 'all_to_all': layer {runner.layer_name!r} dispatches by "
                f"{type(stock).__name__}, which it cannot take the place of; leave it out"
            )
        exchange = AllToAll(owners[layer], group, greeting)
        meter.ranks = exchange.ranks
        meter.row_bytes = exchange.row_bytes(moe.hidden_dim, moe.experts_per_token, moe.in_dtype)
        backend = AllToAllPrepareAndFinalize(exchange, meter)
        method.moe_kernel = FusedMoEKernel(backend, method.moe_kernel.fused_experts)
