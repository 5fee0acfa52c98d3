"""The worker's side of re-routing on a CPU: one object per engine and process, created once."""

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

from sere_ray.artifact import SimilarityArtifact
from sere_ray.config import BoundPolicy, Policy
from sere_ray.errors import PolicyError
from sere_ray.rules import REROUTABLE, RuleCounts
from sere_ray.rules.sere_cpu import reroute_and_count

DECODE_ONLY = 0
"""Counter row of steps in which every row decodes."""
MIXED = 1
"""Counter row of steps that also compute prompt rows."""


@dataclass
class StepTotals:
    """What the host knows of the counted steps of one kind."""

    steps: int = 0
    decode_rows: int = 0
    forward_seconds: float = 0.0


@dataclass
class EngineState:
    """Similarity, policy, row kinds and counters of one engine in this process.

    Attributes:
        policy: what the user wrote, last validated.
        bound: its numbers for this model; replaced between steps.
        similarity: decoder layer index -> ``float32 [E, E]`` on the device.
        row_kind: ``[max_rows]`` int8 on the device, 0 outside a step.
        position: decoder layer index -> row of ``counters``.
        counters: ``[2, layers, 4]`` int64: step kind, layer, fields of :class:`RuleCounts`.
        totals: host-side totals by step kind.
    """

    policy: Policy
    bound: BoundPolicy
    artifact: SimilarityArtifact
    top_k: int
    similarity: dict[int, Tensor]
    row_kind: Tensor
    position: dict[int, int]
    counters: NDArray[np.int64]
    totals: tuple[StepTotals, StepTotals] = field(
        default_factory=lambda: (StepTotals(), StepTotals())
    )
    attached: dict[int, Any] = field(default_factory=dict)
    step_kind: int = DECODE_ONLY
    decode_rows: int = 0

    @classmethod
    def create(
        cls,
        policy: Policy,
        artifact: SimilarityArtifact,
        *,
        top_k: int,
        max_rows: int,
        device: torch.device,
    ) -> "EngineState":
        """Move the artifact to the device and allocate everything a step writes to."""
        _compile_rule(top_k)
        return cls(
            policy=policy,
            bound=policy.for_model(top_k=top_k),
            artifact=artifact,
            top_k=top_k,
            similarity={i: m.to(device) for i, m in sorted(artifact.layers.items())},
            row_kind=torch.zeros(max_rows, dtype=torch.int8, device=device),
            position={layer: i for i, layer in enumerate(sorted(artifact.layers))},
            counters=np.zeros((2, len(artifact.layers), len(RuleCounts._fields)), dtype=np.int64),
        )

    @contextmanager
    def step(self, kinds: NDArray[np.int8]) -> Iterator[None]:
        """Run one forward pass with these row kinds.

        Args:
            kinds: ``[rows]`` int8; rows of the pass beyond it are padding.
        """
        self.decode_rows = int((kinds == REROUTABLE).sum())
        self.step_kind = DECODE_ONLY if self.decode_rows == len(kinds) else MIXED
        self.row_kind[: len(kinds)] = torch.from_numpy(kinds)
        start = time.perf_counter()
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)
            self.row_kind[: len(kinds)] = 0
        if self.decode_rows:
            totals = self.totals[self.step_kind]
            totals.steps += 1
            totals.decode_rows += self.decode_rows
            totals.forward_seconds += time.perf_counter() - start

    def reroute(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Apply the policy to one layer of the running step and count; ``[T, K]`` ids."""
        if self.bound.mode == "off" or not self.decode_rows:
            return topk_ids.clone()
        kinds = self.row_kind[: topk_ids.shape[0]]
        new_ids, counts = reroute_and_count(
            topk_ids,
            topk_weights,
            self.similarity[layer],
            kinds,
            select_top_k=self.bound.select_top_k,
            threshold=self.bound.threshold,
            min_primary_experts=self.bound.min_primary_experts,
        )
        self.counters[self.step_kind, self.position[layer]] += counts
        return new_ids if self.bound.mode == "on" else topk_ids.clone()

    def set_policy(self, value: object) -> Policy:
        """Replace the policy between two steps.

        Raises:
            PolicyError: the new policy is not valid, or names another artifact. The old one stays.
        """
        policy = Policy.parse(value)
        if policy.similarity != self.policy.similarity:
            raise PolicyError(
                f"sere.similarity = {policy.similarity!r}: a running engine keeps its artifact "
                f"({self.policy.similarity!r}); restart it to use another one"
            )
        self.bound = policy.for_model(top_k=self.top_k)
        self.policy = policy
        return policy

    def read_counters(self, *, reset: bool) -> dict[str, Any]:
        """Counters since the last reset, as plain numbers.

        Returns:
            ``{"layers": [...], "policy": {...}, "decode_only": {...}, "mixed": {...}}``; each of
            the last two has ``steps``, ``decode_rows``, ``forward_seconds`` and per layer lists
            ``experts_before``, ``experts_after``, ``slots_rerouted``, ``critical_kept`` (sums
            over steps).
        """
        report: dict[str, Any] = {
            "layers": list(self.similarity),
            "policy": self.policy.model_dump(),
        }
        for kind, name in ((DECODE_ONLY, "decode_only"), (MIXED, "mixed")):
            per_layer = self.counters[kind].T.tolist()
            report[name] = {
                **vars(self.totals[kind]),
                **dict(zip(RuleCounts._fields, per_layer, strict=True)),
            }
        if reset:
            self.counters[:] = 0
            self.totals = (StepTotals(), StepTotals())
        return report


_active: ContextVar[EngineState | None] = ContextVar("sere_ray_active_state", default=None)


def active_state() -> EngineState | None:
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
