"""Re-routing on a CPU: compiled loops, called through an opaque op in every layer."""

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.engine.agreement import Told
from sere_ray.engine.counters import DECODE_ONLY, MIXED
from sere_ray.engine.cpu.dispatch import DispatchMeter, replace_dispatch
from sere_ray.engine.cpu.masked import apply_after_masks
from sere_ray.engine.cpu.rules import LayerOfStep, apply_rule
from sere_ray.engine.cpu.sent import GatheredBytes, Sent
from sere_ray.engine.cpu.union import UnionOfRanks
from sere_ray.engine.layer_checks import check_rows
from sere_ray.engine.signatures import CountsPrompts, PromptSignatures
from sere_ray.engine.state import EngineState
from sere_ray.kernel.cpu_sere import StepCounts
from sere_ray.kernel.memory import NUM_COUNTERS, OWN_COUNTERS
from sere_ray.masks.served import about_model
from sere_ray.masks.slots import LayerMask
from sere_ray.policy.bound import BoundPolicy
from sere_ray.policy.capabilities import EngineKind
from sere_ray.rules import EXACT, REROUTABLE, Choice
from sere_ray.rules.gate import PLAIN


@dataclass
class CpuState(EngineState, CountsPrompts):
    """Row kinds and counters in host memory.

    Attributes:
        max_rows: most rows of a forward pass.
        union: the other data-parallel ranks; None = there are none.
        owner: decoder layer index -> ``[E]`` int64, the rank that holds each expert; no entry
            where one rank holds them all.
        similarity: decoder layer index -> ``[E, E]`` float32, of the running artifact; None where
            there is no artifact.
        statistics: decoder layer index -> its further tensors by name.
        of_level: decoder layer index -> its mask of the running level; empty = nothing is masked.
        sent: counts what goes to other ranks; None = nothing does.
        row_kind: ``[max_rows]`` int8 of the running step.
        row_weight: ``[rows]`` int64 of it, of demand under ``margin``; None = all are whole.
        counters: ``[2, layers, 9]`` by step kind, fields of ``StepCounts``.
        rows: of this rank in the running step, without padding.
        decode_rows: of these, re-routable ones.
        union_rows: re-routable rows that experts are chosen over.
        decodes: whether there are any: else the step is left alone, and not counted.
    """

    max_rows: int
    union: UnionOfRanks | None = field(default=None, kw_only=True)
    owner: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Allocate everything a step writes to, and compile the rules."""
        super().__post_init__()
        self._take_matrices()
        self.row_kind = torch.zeros(self.max_rows, dtype=torch.int8, device="cpu")
        self.row_weight: Tensor | None = None
        self.counters = np.zeros((2, len(self.layers), len(StepCounts._fields)), dtype=np.int64)
        self.current_kind = DECODE_ONLY
        self.rows = self.decode_rows = self.union_rows = 0
        self.decodes = self.has_exact_row = self.agreed = False
        self.sent: Sent | None = None
        if self.union is not None and self.startup.dispatch == "all_to_all":
            self.sent = DispatchMeter(len(self.layers))
        elif self.union is not None:
            self.sent = GatheredBytes(len(self.layers))
        _compile_rules(self.top_k, masked=self.masks is not None)

    @property
    def kind(self) -> EngineKind:
        """On a CPU."""
        return {"on_gpu": False, "several_ranks": self.union is not None}

    def run(self, told: Told) -> None:
        """Read policy and matrices from now on; nothing that runs points to the former ones."""
        self.running = told
        self._take_matrices()

    def _take_matrices(self) -> None:
        artifact, masks = self.running.artifact, self.running.masks
        self.similarity: dict[int, Tensor | None] = dict.fromkeys(self.layers)
        self.statistics: dict[int, Mapping[str, Tensor]] = {layer: {} for layer in self.layers}
        if artifact is not None:
            self.similarity |= {layer: artifact.layers[layer].cpu() for layer in self.layers}
            self.statistics |= artifact.statistics
        level, path = self.bound.level, str(self.policy.masks)
        self.of_level = {} if masks is None else masks.level(level, path=path)

    def loaded(self) -> None:
        """Also put the all-to-all in, where it was asked for."""
        super().loaded()
        if self.union is not None and isinstance(self.sent, DispatchMeter):
            ranks = self.union
            replace_dispatch(self.attached, self.owner, self.sent, ranks.group, ranks.greeting)

    # --- a step -----------------------------------------------------------------------------------

    @contextmanager
    def step(
        self, kinds: NDArray[np.int8], drafts: NDArray[np.int8] | None = None
    ) -> Iterator[None]:
        """Run one forward pass with these row kinds.

        Args:
            kinds: ``[rows]`` int8; rows of the pass beyond it are padding.
            drafts: ``[rows]`` int8 of :func:`sere_ray.engine.row_kinds.draft_positions`; None =
                there are none.
        """
        self.begin(kinds)
        weights = self.row_weights(drafts)
        self.row_weight = None if weights is None else torch.from_numpy(weights)
        start = time.perf_counter()
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)
            self.row_kind[: len(kinds)] = 0
        if self.decodes:
            seconds = time.perf_counter() - start
            num_drafts = 0 if drafts is None else int(np.count_nonzero(drafts))
            self.count_step(
                self.current_kind, self.decode_rows, len(kinds), seconds, draft_rows=num_drafts
            )

    def begin(self, kinds: NDArray[np.int8]) -> None:
        """Take over the row kinds of a pass, ``[rows]`` int8.

        Ranks talk later, in the first layer, where all are in step.
        """
        self.rows = len(kinds)
        self.decode_rows = self.union_rows = int((kinds == REROUTABLE).sum())
        self.decodes, self.has_exact_row = self.decode_rows > 0, bool((kinds == EXACT).any())
        self.current_kind = self.step_kind(kinds)
        self.row_kind[: len(kinds)] = torch.from_numpy(kinds)
        self.agreed = self.union is None

    def _agree(self, union: UnionOfRanks) -> None:
        """The policy of this pass, and which rows it has anywhere; a collective call."""
        assert self.versions is not None
        newest, checksum = self.versions.newest, self.versions.checksum
        found = union.agree(newest, checksum, self.decode_rows, has_exact_row=self.has_exact_row)
        self.run_common(
            found.lowest_version, found.highest_version, same_checksum=found.same_checksum
        )
        if self.bound.union == "global":
            self.decodes, self.union_rows = found.decodes, found.decode_rows
            self.current_kind = MIXED if found.is_mixed else DECODE_ONLY
        self.agreed = True

    # --- a layer ----------------------------------------------------------------------------------

    def choose(
        self,
        layer: int,
        topk_ids: Tensor,
        topk_weights: Tensor,
        router_logits: Tensor,
        hidden_states: Tensor | None = None,
    ) -> Choice:
        """Apply the policy to one layer of the running step and count.

        The way down: the rule, in between its exchange with other ranks, then the compiled loops.

        Args:
            layer: decoder layer index.
            topk_ids: ``[T, K]``.
            topk_weights: ``[T, K]``.
            router_logits: ``[T, E]``.
            hidden_states: ``[T, H]``, what goes to the experts; None where nothing is masked.

        Returns:
            New ids and weights, ``[T, K]`` each; never the given tensors.
        """
        if self.union is not None and not self.agreed:
            self._agree(self.union)
        check_rows(layer, topk_ids.shape[0], self.rows)
        position, kinds = self.position[layer], self.row_kind[: topk_ids.shape[0]]
        if self.signatures is not None:
            self.signatures.add(position, topk_ids.numpy())
        if self.sent is not None:
            counter = (self.current_kind, position) if self.decodes else None
            self.sent.begin_layer(topk_ids, kinds, counter)
        if self.bound.mode == "off" or not self.decodes:
            return topk_ids.clone(), topk_weights.clone()
        bound = self.bound.for_rows(self.union_rows)
        of_step = LayerOfStep(
            layer,
            position,
            topk_ids,
            topk_weights,
            router_logits,
            self.gates.known.get(layer, PLAIN),
            kinds,
            self.similarity[layer],
            self.statistics[layer],
            self.owner.get(layer),
            skips_dropped=layer in self.owner,  # see expert_parallel.py
            row_weight=self.row_weight,
        )
        union = self.union if self.bound.union == "global" else None
        if layer in self.gates.exact:
            bound = bound.identity(self.top_k)
        if layer in self.of_level or bound.rule == "none":
            mask = self.of_level.get(layer)
            new, counts = apply_after_masks(bound, of_step, hidden_states, mask, union)
        else:
            new, counts = apply_rule(bound, of_step, union)
        if self.bound.mode == "observe":
            new, counts = (topk_ids.clone(), topk_weights.clone()), counts._replace(slots_merged=0)
        self.counters[self.current_kind, position] += counts
        return new

    # --- counters ---------------------------------------------------------------------------------

    def make_signatures(self) -> PromptSignatures:
        """Of all layers with experts."""
        return PromptSignatures(
            len(self.layers), about_model(self.artifact, self.masks).num_experts
        )

    def gates_of_model(self) -> str:
        """Of the fingerprints that the gates were checked against."""
        prints = sorted(about_model(self.artifact, self.masks).router_fingerprint.items())
        return hashlib.sha256(repr(prints).encode()).hexdigest()[:16]

    def read_layer_counters(self) -> NDArray[np.int64]:
        """Under ``union: local`` no rank knows what others read."""
        is_local = self.union is not None and self.bound.union == "local"
        return self.counters[:, :, : OWN_COUNTERS if is_local else NUM_COUNTERS]

    def read_masked(self) -> list[list[int]]:
        """The last of ``StepCounts``."""
        masked: list[list[int]] = self.counters[:, :, -1].tolist()
        return masked

    def read_bytes(self) -> list[dict[str, list[int] | None]]:
        """What goes to other ranks, with the gate's ids and with the rule's."""
        return super().read_bytes() if self.sent is None else self.sent.read_bytes()

    def add_to_report(self, report: dict[str, Any]) -> None:
        """With ``dispatch: all_to_all`` also what it moved: :meth:`DispatchMeter.add_to_report`."""
        if self.sent is not None:
            self.sent.add_to_report(report)

    def reset_counters(self) -> None:
        """Also those by layer."""
        super().reset_counters()
        self.counters[:] = 0
        if self.sent is not None:
            self.sent.reset()


_active: ContextVar[CpuState | None] = ContextVar("sere_ray_active_state", default=None)


def active_state() -> CpuState | None:
    """The state of the running forward pass, None outside one (warm-up, draft models)."""
    return _active.get()


def _compile_rules(top_k: int, *, masked: bool) -> None:
    """Compile for the dtypes of vLLM's CPU router, so that no step waits for it."""
    experts = top_k + 1
    floats = torch.zeros((1, experts), dtype=torch.float32)  # vLLM sets another default at loading
    ids = torch.arange(top_k, dtype=torch.int32)[None]
    kinds = torch.ones(1, dtype=torch.int8)
    similarity = floats.expand(experts, experts)
    layer = LayerOfStep(
        0, 0, ids, floats[:, :top_k], floats, PLAIN, kinds, similarity, {}, None, skips_dropped=True
    )
    for rule, knobs in {"sere": (), "margin": (("tau", 1.0),)}.items():
        bound = BoundPolicy(
            mode="on",
            rule=rule,
            select_top_k=1,
            threshold=None,
            min_primary_experts=0,
            knobs=knobs,
        )
        apply_rule(bound, layer, None)
        if masked:
            mask = LayerMask(torch.zeros_like(similarity), keep_first=True)
            apply_after_masks(bound, layer, floats, mask, None)
