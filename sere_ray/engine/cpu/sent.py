"""How many bytes of a layer go to other ranks, by step kind and layer."""

from typing import Any, Protocol

import numpy as np
from torch import Tensor

from sere_ray.engine.counters import BYTES

Counter = tuple[int, int]
"""Step kind and layer position that something is counted under."""


class Sent(Protocol):
    """Counts what dispatch sends."""

    def begin_layer(self, gate_ids: Tensor, row_kind: Tensor, counter: Counter | None) -> None:
        """The rows of a layer are dispatched next.

        Args:
            gate_ids: ``[T, K]``, before the rule.
            row_kind: ``[T]`` int8.
            counter: what is counted under; None = it is not counted.
        """
        ...

    def add_gathered(self, size: int) -> None:
        """Count bytes that vLLM's all-gather sends of the layer that began last."""
        ...

    def read_bytes(self) -> list[dict[str, list[int] | None]]:
        """``BYTES`` of each step kind, a list by layer."""
        ...

    def add_to_report(self, report: dict[str, Any]) -> None:
        """Add what else is counted to :meth:`EngineState.read_counters`."""
        ...

    def reset(self) -> None:
        """Count from zero again."""
        ...


class GatheredBytes:
    """Of vLLM's all-gather, which sends the same whatever the rule does.

    Args:
        num_layers: MoE layers of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self.sums = np.zeros((2, num_layers), dtype=np.int64)
        self.counter: Counter | None = None

    def begin_layer(self, gate_ids: Tensor, row_kind: Tensor, counter: Counter | None) -> None:
        """Note what is counted under; ids and kinds change nothing."""
        self.counter = counter

    def add_gathered(self, size: int) -> None:
        """Count bytes of the layer that began last."""
        if self.counter is not None:
            self.sums[self.counter] += size

    def read_bytes(self) -> list[dict[str, list[int] | None]]:
        """``BYTES`` of each step kind, a list by layer."""
        sums: list[list[int]] = self.sums.tolist()
        return [dict.fromkeys(BYTES, of_layers) for of_layers in sums]

    def add_to_report(self, report: dict[str, Any]) -> None:
        """Nothing more."""

    def reset(self) -> None:
        """Count from zero again."""
        self.sums[:] = 0
