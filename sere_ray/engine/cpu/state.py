"""Re-routing on a CPU: compiled loops, called through an opaque op in every layer."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.engine.cpu.rules import check_gate, choose_and_count
from sere_ray.engine.state import DECODE_ONLY, EngineState
from sere_ray.kernel.cpu_sere import StepCounts, reroute_and_count
from sere_ray.policy.bound import BoundPolicy
from sere_ray.policy.policy import Policy
from sere_ray.rules import REROUTABLE, Choice, Layer


@dataclass
class CpuState(EngineState):
    """Row kinds and counters in host memory.

    Attributes:
        max_rows: most rows of a forward pass.
        owner: decoder layer index -> ``[E]`` int64, the rank that holds each expert; no entry
            where one rank holds them all.
        union_rows: re-routable rows of the running step that experts are chosen over.
    """

    max_rows: int
    owner: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Allocate everything a step writes to, and compile the rule."""
        super().__post_init__()
        self.apply_artifact()
        self.row_kind = torch.zeros(self.max_rows, dtype=torch.int8, device="cpu")
        self.counters = np.zeros((2, len(self.layers), len(StepCounts._fields)), dtype=np.int64)
        self.current_kind = DECODE_ONLY
        self.decode_rows = self.union_rows = 0
        _compile_rule(self.top_k)

    def apply_artifact(self) -> None:
        """See the base class."""
        self.similarity = {layer: self.artifact.layers[layer].cpu() for layer in self.layers}

    @contextmanager
    def step(self, kinds: NDArray[np.int8]) -> Iterator[None]:
        """Run one forward pass with these row kinds.

        Args:
            kinds: ``[rows]`` int8; rows of the pass beyond it are padding.
        """
        self.begin(kinds)
        start = time.perf_counter()
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)
            self.row_kind[: len(kinds)] = 0
        seconds = time.perf_counter() - start
        self.count_step(self.current_kind, self.decode_rows, len(kinds), seconds)

    def begin(self, kinds: NDArray[np.int8]) -> None:
        """Take over the row kinds of a pass; ``[rows]`` int8."""
        self.decode_rows = self.union_rows = int((kinds == REROUTABLE).sum())
        self.current_kind = self.step_kind(kinds)
        self.row_kind[: len(kinds)] = torch.from_numpy(kinds)

    @property
    def running(self) -> BoundPolicy:
        """The policy's numbers for the running step."""
        return self.bound.for_rows(self.union_rows)

    def check_supported(self, policy: Policy) -> None:
        """See the base class."""
        for runner in self.attached.values():
            check_gate(policy, runner.router)

    def choose(
        self, layer: int, topk_ids: Tensor, topk_weights: Tensor, router_logits: Tensor
    ) -> Choice:
        """Apply the policy's rule to one layer of the running step and count; ``[T, K]`` each."""
        self.before_layer(layer, topk_ids)
        if self.bound.rule == "sere":
            return self.reroute(layer, topk_ids, topk_weights), topk_weights.clone()
        old = topk_ids.clone(), topk_weights.clone()
        if self.bound.mode == "off" or not self.has_decode_row():
            return old
        new, counts = self.apply_other_rule(layer, topk_ids, topk_weights, router_logits)
        self.counters[self.current_kind, self.position[layer]] += counts
        return new if self.bound.mode == "on" else old

    def apply_other_rule(
        self, layer: int, topk_ids: Tensor, topk_weights: Tensor, router_logits: Tensor
    ) -> tuple[Choice, StepCounts]:
        """What a rule other than ``sere`` chooses for a layer, and what changed."""
        return choose_and_count(
            self.bound.rule,
            topk_ids,
            topk_weights,
            router_logits,
            self.row_kind[: topk_ids.shape[0]],
            self.knobs(layer),
            self.owner.get(layer),
        )

    def knobs(self, layer: int) -> Layer:
        """What a rule is given beside the rows of a layer."""
        matrix = self.similarity[layer]
        position, owner = self.position[layer], self.owner.get(layer)
        return self.running.of_layer(position, len(matrix), matrix, owner)

    def before_layer(self, layer: int, topk_ids: Tensor) -> None:
        """Do what comes before the rule in a layer; one rank has nothing to do."""

    def reroute(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The same for the rule ``sere``: new ids alone."""
        if self.bound.mode == "off" or not self.has_decode_row():
            return topk_ids.clone()
        kinds = self.row_kind[: topk_ids.shape[0]]
        new_ids, counts = self.apply_rule(layer, topk_ids, topk_weights, kinds)
        self.counters[self.current_kind, self.position[layer]] += counts
        return new_ids if self.bound.mode == "on" else topk_ids.clone()

    def count_sent(self, size: int) -> None:
        """Take note of bytes that vLLM sends to other ranks; here there are none that dispatch."""

    def has_decode_row(self) -> bool:
        """Whether the running step has a row that may be re-routed."""
        return self.decode_rows > 0

    def apply_rule(
        self, layer: int, topk_ids: Tensor, topk_weights: Tensor, kinds: Tensor
    ) -> tuple[Tensor, StepCounts]:
        """New ids of a layer, and what changed."""
        arguments = self.rule_arguments(layer)
        return reroute_and_count(topk_ids, topk_weights, self.similarity[layer], kinds, **arguments)

    def rule_arguments(self, layer: int) -> dict[str, Any]:
        """The policy as the rule takes it for this layer."""
        running = self.running
        return {
            "select_top_k": running.select_top_k,
            "threshold": running.threshold,
            "min_primary_experts": running.min_primary_experts,
            "owner": self.owner.get(layer),
        }

    def read_device_counters(self, *, reset: bool) -> NDArray[np.int64]:
        """See the base class."""
        counters = self.counters.copy()
        if reset:
            self.counters[:] = 0
        return counters


_active: ContextVar[CpuState | None] = ContextVar("sere_ray_active_state", default=None)


def active_state() -> CpuState | None:
    """The state of the running forward pass, None outside one (warm-up, draft models)."""
    return _active.get()


def _compile_rule(top_k: int) -> None:
    """Compile for the dtypes of vLLM's CPU router, so that the first step does not wait for it."""
    ids = torch.zeros((1, top_k), dtype=torch.int32)
    reroute_and_count(
        ids,
        ids.float(),
        torch.ones((1, 1), dtype=torch.float32),  # vLLM sets another default while it loads
        torch.ones(1, dtype=torch.int8),
        select_top_k=1,
        threshold=None,
        min_primary_experts=0,
    )
