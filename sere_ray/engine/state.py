"""The worker's side of re-routing: one object per engine and process, created once."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.engine.agreement import Told, Versions
from sere_ray.engine.counters import (
    BYTES,
    COUNTERS,
    DECODE_ONLY,
    KIND_NAMES,
    MIXED,
    SLOTS_MASKED,
)
from sere_ray.engine.gate import Gates
from sere_ray.engine.step_totals import StepTotals
from sere_ray.masks.artifact import MasksArtifact
from sere_ray.masks.served import check_level, layers_of
from sere_ray.policy.bound import BoundPolicy
from sere_ray.policy.capabilities import (
    EngineKind,
    check_artifact,
    check_change,
    check_swap,
    check_tables,
)
from sere_ray.policy.key import parse_key
from sere_ray.policy.named_files import FILE_KEYS
from sere_ray.policy.policy import Policy
from sere_ray.policy.startup import Startup
from sere_ray.rules import REROUTABLE
from sere_ray.util.errors import PolicyError

RESTART = "restart it to change it"


@dataclass
class EngineState(ABC):
    """Similarity, policy and counters of one engine in this process.

    Attributes:
        policy: what the user wrote, the last that was told and is valid.
        artifact: the similarity artifact that goes with it; None = the policy names none.
        top_k: K of the model.
        startup: what the engine was started with and keeps.
        masks: the learned masks that it was started with and keeps; None = there are none.
        decoder_layers: how many the model has, with experts or without.
        layers: those with experts, by index, in the order of the counters: what the policy's files
            say; without files all, until the model is loaded.
        position: of a layer among them.
        attached: decoder layer index -> vLLM's runner of that layer.
        totals: host-side totals by step kind.
        running: what is computed with; behind ``policy`` while other ranks do not know that.
        versions: what this rank was told; None = one rank, which runs it at once.
        gates: what layers rank experts by.
        draft_weights: of :class:`sere_ray.engine.acceptance.Acceptance`, of the step that comes.
    """

    policy: Policy
    artifact: SimilarityArtifact | None
    top_k: int
    startup: Startup = field(default_factory=Startup, kw_only=True)
    masks: MasksArtifact | None = field(default=None, kw_only=True)
    decoder_layers: int = field(default=0, kw_only=True)
    attached: dict[int, Any] = field(default_factory=dict, init=False)
    gates: Gates = field(default_factory=Gates, init=False)
    draft_weights: tuple[int, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        """Number the layers and bind the policy to this model."""
        named = layers_of(self.artifact, self.masks)
        self.layers = named or list(range(self.decoder_layers))
        self.position = {layer: i for i, layer in enumerate(self.layers)}
        self.totals = (StepTotals(), StepTotals())
        self.running = self._told(self.policy, self.artifact)
        self.versions = Versions(self.running) if self.kind["several_ranks"] else None

    @property
    @abstractmethod
    def kind(self) -> EngineKind:
        """What decides which policies this engine can run."""

    @property
    def bound(self) -> BoundPolicy:
        """The numbers of the running policy."""
        return self.running.bound

    # --- policies ---------------------------------------------------------------------------------

    @abstractmethod
    def run(self, told: Told) -> None:
        """Compute with this policy and artifact from now on."""

    def set_policy(self, value: object, artifact: bytes | None = None) -> Policy:
        """Replace the policy, and with it the artifact, between two steps.

        Where there are several ranks all must be told the same in the same order, and the new
        policy runs from the first pass on before which every rank was told.

        Args:
            value: the new policy.
            artifact: content of the file that ``similarity`` names; None keeps the running one.

        Raises:
            PolicyError: it is not valid, or these engines would have to restart for it or for the
                artifact.
            UnsupportedError: this engine cannot run it.
            ArtifactError: the artifact is damaged, of other weights, or says less than the rule
                reads. After any of these all stays as it was.
        """
        policy, new = self.check_policy(value, artifact), self.artifact
        if artifact is not None and self.artifact is not None:
            name = str(policy.similarity)
            new = SimilarityArtifact.from_bytes(artifact, name=name)
            new.check_replaces(self.artifact, path=name)
            check_tables(new, self.artifact, on_gpu=self.kind["on_gpu"])
        check_artifact(policy, new)
        self.policy, self.artifact = policy, new
        told = self._told(policy, new)
        if self.versions is None:
            self.run(told)
        else:
            self.versions.add(told, artifact)
        return policy

    def run_common(self, lowest: int, highest: int, *, same_checksum: bool) -> None:
        """Run the newest policy that all ranks were told; as :meth:`Versions.common`."""
        assert self.versions is not None
        told = self.versions.common(lowest, highest, same_checksum=same_checksum)
        if told is not self.running:
            self.run(told)

    def check_policy(self, value: object, artifact: bytes | None = None) -> Policy:
        """Validate a policy for this engine.

        Args:
            value: the policy.
            artifact: content of the file that ``similarity`` names; None keeps the running one.

        Raises:
            PolicyError: it is not valid, names another artifact without giving it, another setting
                of the start, or what a running engine cannot change to.
            UnsupportedError: this engine cannot run it.
        """
        policy, startup = parse_key(value, running=self.startup)
        for key in startup.model_fields_set:
            new, running = getattr(startup, key), getattr(self.startup, key)
            if new != running:
                raise PolicyError(
                    f"sere.{key} = {new!r}: a running engine keeps what it was started with "
                    f"({running!r}); {RESTART}"
                )
        for key in FILE_KEYS:
            new, running = getattr(policy, key), getattr(self.policy, key)
            if new != running and (artifact is None or key == "masks"):
                remedy = "send it the new one, or restart it" if key == "similarity" else RESTART
                raise PolicyError(
                    f"sere.{key} = {new!r}: a running engine keeps its file ({running!r}); {remedy}"
                )
        if artifact is not None:
            check_swap(str(policy.similarity), self.policy.similarity, **self.kind)
        check_change(policy, self.policy, **self.kind)
        check_level(policy.level, self.masks, path=policy.masks)
        self.gates.check(policy)
        policy.check_layers(len(self.layers))
        return policy

    def _told(self, policy: Policy, artifact: SimilarityArtifact | None) -> Told:
        strengths = None if artifact is None else artifact.metadata.strengths
        return Told(policy.for_model(top_k=self.top_k, strengths=strengths), artifact, self.masks)

    # --- layers -----------------------------------------------------------------------------------

    def note_gate(self, layer: int, router: Any) -> None:
        """Take note of what rules can read from a layer's gate.

        Args:
            layer: decoder layer index.
            router: vLLM's.

        Raises:
            UnsupportedError: less than the policy's rule has to.
        """
        self.gates.note(layer, router)
        self.gates.check(self.policy)

    def loaded(self) -> None:
        """Do what is left to do once the model's weights are loaded."""
        self.gates.load(self.attached)
        if self.artifact is None and self.masks is None:
            self.layers = sorted(self.attached)

    # --- steps and counters -----------------------------------------------------------------------

    def step_kind(self, kinds: NDArray[np.int8]) -> int:
        """Counter row of a step with these row kinds, ``[rows]``."""
        return DECODE_ONLY if bool((kinds == REROUTABLE).all()) else MIXED

    def row_weights(self, drafts: NDArray[np.int8] | None) -> NDArray[np.int64] | None:
        """``[rows]`` int64 of a step, from its rows' places as drafts; None = all are whole."""
        if drafts is None or not self.draft_weights or not drafts.any():
            return None
        return np.array(self.draft_weights, dtype=np.int64)[drafts]

    def count_step(
        self,
        kind: int,
        decode_rows: int,
        rows: int,
        seconds: float | None = None,
        *,
        draft_rows: int = 0,
    ) -> None:
        """Add a step to the totals.

        Args:
            kind: ``DECODE_ONLY`` or ``MIXED``.
            decode_rows: rows of this rank that may be re-routed.
            rows: all of its rows.
            seconds: of the forward pass; None = not measured.
            draft_rows: of the re-routable ones, rows that verify a draft.
        """
        totals = self.totals[kind]
        totals.steps += 1
        totals.steps_counted += self.bound.mode != "off"
        totals.rows += rows
        totals.decode_rows += decode_rows
        totals.draft_rows += draft_rows
        if seconds is not None:
            totals.forward_seconds = (totals.forward_seconds or 0.0) + seconds

    @abstractmethod
    def read_layer_counters(self) -> NDArray[np.int64]:
        """``[2, layers, n]``: step kind, layer, the first n of ``COUNTERS`` that are counted."""

    def read_bytes(self) -> list[dict[str, list[int] | None]]:
        """``BYTES`` of each step kind; None where not counted. One rank sends nothing."""
        nothing = [0] * len(self.layers)
        return [dict.fromkeys(BYTES, nothing) for _ in range(2)]

    def read_masked(self) -> list[list[int]]:
        """``SLOTS_MASKED`` of each step kind; an engine that takes no masks masks nothing."""
        return [[0] * len(self.layers)] * 2

    def add_to_report(self, report: dict[str, Any]) -> None:  # noqa: B027  (one rank has no more)
        """Add what only engines of this kind count to what :meth:`read_counters` returns."""

    def reset_counters(self) -> None:
        """Count from zero again."""
        self.totals = (StepTotals(), StepTotals())

    def read_counters(self, *, reset: bool) -> dict[str, Any]:
        """Counters since the last reset, as plain numbers.

        Returns:
            ``layers``, ``top_k``, ``policy``, and for the two kinds of step ``decode_only`` and
            ``mixed``: the fields of :class:`StepTotals` and, as lists by layer (sums over steps),
            those of ``COUNTERS``, ``SLOTS_MASKED`` and ``BYTES``; None where this engine cannot
            count. Then what :meth:`add_to_report` adds.
        """
        counters, sent = self.read_layer_counters(), self.read_bytes()
        masked = self.read_masked()
        report: dict[str, Any] = {
            "layers": self.layers,
            "top_k": self.top_k,
            "policy": self.policy.model_dump(),
        }
        for kind, name in enumerate(KIND_NAMES):
            report[name] = {
                **vars(self.totals[kind]),
                **dict.fromkeys(COUNTERS),
                **dict(zip(COUNTERS, counters[kind].T.tolist(), strict=False)),
                SLOTS_MASKED: masked[kind],
                **sent[kind],
            }
        self.add_to_report(report)
        if reset:
            self.reset_counters()
        return report
