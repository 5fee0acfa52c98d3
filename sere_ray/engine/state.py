"""The worker's side of re-routing: one object per engine and process, created once."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.policy.policy import Policy, Startup, parse_key
from sere_ray.rules import REROUTABLE, RuleCounts
from sere_ray.util.errors import PolicyError

DECODE_ONLY = 0
"""Counter row of steps in which every row decodes."""
MIXED = 1
"""Counter row of steps that also compute prompt rows."""
Routing = tuple[Tensor, Tensor]
"""``topk_weights`` and ``topk_ids``, ``[T, K]`` each, as vLLM orders them."""
COUNTERS = (*RuleCounts._fields, "experts_max_rank_before", "experts_max_rank_after")
"""Per layer: those of the rule, then experts of the rank that reads most of them."""
BYTES = ("bytes_dispatched_before", "bytes_dispatched_after")
"""Per layer: what dispatch sends to other ranks, with the gate's ids and with the rule's."""
Wrap = Callable[[Any, str, Callable[..., Any]], None]
"""Replaces ``owner.name`` by ``wrapper(original, *args, **kwargs)``, once."""


@dataclass
class StepTotals:
    """What the host knows of the counted steps of one kind."""

    steps: int = 0
    steps_counted: int = 0
    """Of these, steps under the modes ``on`` and ``observe``: only they count experts and slots."""
    rows: int = 0
    """Rows of this rank, of prompts and of exact requests, too."""
    decode_rows: int = 0
    """Rows that may be re-routed."""
    forward_seconds: float | None = None
    """Wall time of the forward passes; None where they run asynchronously (GPU)."""


@dataclass
class EngineState(ABC):
    """Similarity, policy and counters of one engine in this process.

    Attributes:
        policy: what the user wrote, last validated.
        artifact: the similarity artifact.
        top_k: K of the model.
        startup: what the engine was started with and keeps.
        layers: decoder layer indices, in the order of the counters.
        attached: decoder layer index -> vLLM's runner of that layer.
        totals: host-side totals by step kind.
    """

    policy: Policy
    artifact: SimilarityArtifact
    top_k: int
    startup: Startup = field(default_factory=Startup, kw_only=True)
    attached: dict[int, Any] = field(default_factory=dict, init=False)
    totals: tuple[StepTotals, StepTotals] = field(init=False)

    def __post_init__(self) -> None:
        """Number the layers and bind the policy to this model."""
        self.layers = sorted(self.artifact.layers)
        self.position = {layer: i for i, layer in enumerate(self.layers)}
        self.totals = (StepTotals(), StepTotals())
        self.bound = self.policy.for_model(top_k=self.top_k)

    @abstractmethod
    def read_device_counters(self, *, reset: bool) -> NDArray[np.int64]:
        """``[2, layers, n]``: step kind, layer, the first n of ``COUNTERS`` that are counted."""

    def read_bytes(self, *, reset: bool) -> list[dict[str, list[int] | None]]:
        """``BYTES`` of each step kind; None where not counted. One rank sends nothing."""
        nothing = [0] * len(self.layers)
        return [dict.fromkeys(BYTES, nothing) for _ in range(2)]

    def check_supported(self, policy: Policy) -> None:  # noqa: B027
        """Refuse a policy that this path cannot run.

        Raises:
            UnsupportedError: names the key.
        """

    def apply_policy(self) -> None:  # noqa: B027  (nothing to do where the policy is read per call)
        """Make ``self.bound`` the policy of everything that is computed from now on."""

    def loaded(self) -> None:  # noqa: B027
        """Do what is left to do once the model's weights are loaded."""

    @abstractmethod
    def apply_artifact(self) -> None:
        """Make ``self.artifact`` that of everything that is computed from now on."""

    def step_kind(self, kinds: NDArray[np.int8]) -> int:
        """Counter row of a step with these row kinds."""
        return DECODE_ONLY if bool((kinds == REROUTABLE).all()) else MIXED

    def count_step(
        self, kind: int, decode_rows: int, rows: int, seconds: float | None = None
    ) -> None:
        """Add a step to the totals; steps without a decode row are not counted."""
        if decode_rows:
            self.add_step(kind, decode_rows, rows, seconds)

    def add_step(self, kind: int, decode_rows: int, rows: int, seconds: float | None) -> None:
        """Add a step to the totals whatever its rows."""
        totals = self.totals[kind]
        totals.steps += 1
        totals.steps_counted += self.bound.mode != "off"
        totals.rows += rows
        totals.decode_rows += decode_rows
        if seconds is not None:
            totals.forward_seconds = (totals.forward_seconds or 0.0) + seconds

    def check_policy(self, value: object, artifact: bytes | None = None) -> Policy:
        """Validate a policy for this engine.

        Args:
            value: the policy.
            artifact: content of the file that ``similarity`` names; None keeps the running one.

        Raises:
            PolicyError: it is not valid, names another artifact without giving it, or another
                setting of the start.
            UnsupportedError: this path cannot run it.
        """
        policy, startup = parse_key(value)
        for key in startup.model_fields_set:
            new, running = getattr(startup, key), getattr(self.startup, key)
            if new != running:
                raise PolicyError(
                    f"sere.{key} = {new!r}: a running engine keeps what it was started with "
                    f"({running!r}); restart it to change it"
                )
        if artifact is None and policy.similarity != self.policy.similarity:
            raise PolicyError(
                f"sere.similarity = {policy.similarity!r}: a running engine keeps its artifact "
                f"({self.policy.similarity!r}); send it the new one, or restart it"
            )
        self.check_supported(policy)
        policy.check_layers(len(self.layers))
        policy.for_model(top_k=self.top_k)
        return policy

    def set_policy(self, value: object, artifact: bytes | None = None) -> Policy:
        """Replace the policy, and with it the artifact, between two steps.

        Args:
            value: the new policy.
            artifact: content of the file that ``similarity`` names; None keeps the running one.

        Raises:
            PolicyError: as for :meth:`check_policy`.
            UnsupportedError: likewise.
            ArtifactError: the artifact is damaged or of other weights. In any case all stays as
                it was.
        """
        policy = self.check_policy(value, artifact)
        bound = policy.for_model(top_k=self.top_k)
        if artifact is not None:
            new = SimilarityArtifact.from_bytes(artifact, name=policy.similarity)
            new.check_replaces(self.artifact, path=policy.similarity)
            self.artifact = new
            self.apply_artifact()
        self.bound, self.policy = bound, policy
        self.apply_policy()
        return policy

    def read_counters(self, *, reset: bool) -> dict[str, Any]:
        """Counters since the last reset, as plain numbers.

        Returns:
            ``layers``, ``top_k``, ``policy``, and for the two kinds of step ``decode_only`` and
            ``mixed``: the fields of :class:`StepTotals` and, as lists by layer (sums over steps),
            those of ``COUNTERS`` and ``BYTES``; None where this engine cannot count.
        """
        counters, sent = self.read_device_counters(reset=reset), self.read_bytes(reset=reset)
        report: dict[str, Any] = {
            "layers": self.layers,
            "top_k": self.top_k,
            "policy": self.policy.model_dump(),
        }
        for kind, name in ((DECODE_ONLY, "decode_only"), (MIXED, "mixed")):
            report[name] = {
                **vars(self.totals[kind]),
                **dict.fromkeys(COUNTERS),
                **dict(zip(COUNTERS, counters[kind].T.tolist(), strict=False)),
                **sent[kind],
            }
        if reset:
            self.totals = (StepTotals(), StepTotals())
        return report


_states: dict[int, tuple[Any, EngineState]] = {}
"""By id() of an engine's VllmConfig, which is kept too: an id is free again once its object is."""


def add_state(vllm_config: Any, state: EngineState) -> None:
    """Keep the state of the engine with this configuration."""
    _states[id(vllm_config)] = vllm_config, state


def find_state(vllm_config: Any) -> EngineState | None:
    """The state of the engine with this configuration; None without the ``sere`` key."""
    return _states.get(id(vllm_config), (None, None))[1]


def all_states() -> list[EngineState]:
    """Of all engines this process has had, in the order of their start."""
    return [state for _, state in _states.values()]
