"""Re-routing on a GPU: one launch per layer, in eager passes and in captured graphs alike."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.engine.agreement import Told
from sere_ray.engine.back_end import Routing
from sere_ray.engine.counters import BYTES, SHARDS
from sere_ray.engine.gpu.among_ranks import AmongRanks
from sere_ray.engine.gpu.device_rule import DeviceRule
from sere_ray.engine.gpu.mask_router import MaskRouter
from sere_ray.engine.gpu.own_rows import Deferred, OwnRows
from sere_ray.engine.gpu.rank_group import RankGroup
from sere_ray.engine.gpu.union import UnionOfRanks
from sere_ray.kernel.alignment import Aligned
from sere_ray.kernel.limits import reads_logits, unreadable
from sere_ray.kernel.memory import ALL_KEPT, FIRST_KEPT, MASKED, OWN_COUNTERS
from sere_ray.policy.capabilities import EngineKind
from sere_ray.util.errors import UnsupportedError

_ANY_BLOCK = 16


@dataclass
class CudaState(AmongRanks):
    """Policies, steps and layers of one engine; rows are in device memory.

    Attributes:
        num_experts: E, logical experts.
        max_rows: most rows of a forward pass.
        device: of this worker.
        ranks: over which the union is taken; None = there is one data-parallel rank.
        rule: matrices and the running policy's numbers.
        own: this rank's rows.
        union: the rows of all ranks; None = there is one.
        mask_routers: decoder layer index -> its mask router; none without masks.
        deferred: the layer that is computed now, if its ids are re-routed when they are sorted.
        exact_requests: running requests that ask for exact routing.
    """

    num_experts: int
    max_rows: int
    device: torch.device
    ranks: RankGroup | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Allocate everything graphs will point to."""
        super().__post_init__()
        artifact = self.artifact
        matrices = {i: None if artifact is None else artifact.layers[i] for i in self.layers}
        statistics = None if artifact is None else artifact.statistics
        masks = ALL_KEPT
        if self.masks is not None:
            masks = FIRST_KEPT if self.masks.metadata.keep_first else MASKED
        shape = self.top_k, self.num_experts
        self.rule = DeviceRule(matrices, *shape, self.device, self.bound, statistics, masks)
        self.mask_routers: dict[int, MaskRouter] = {}
        self.own = OwnRows(self.rule, self.max_rows)
        self.union = UnionOfRanks(self.ranks, self.rule, self.max_rows) if self.ranks else None
        self.deferred: Deferred | None = None
        self.exact_requests: set[str] = set()

    @property
    def kind(self) -> EngineKind:
        """On a GPU."""
        return {"on_gpu": True, "several_ranks": self.ranks is not None}

    def loaded(self) -> None:
        """Also copy what gates rank by, put mask routers beside them, and compile the kernels."""
        super().loaded()
        self.rule.keep(self.layers)
        if self.masks is not None:
            self.mask_routers = {i: MaskRouter(at.gate) for i, at in self.attached.items()}
            self._write_masks()
        self.rule.note_gates(self.gates.known, self.gates.exact)
        self.own.load()
        if self.union is not None:
            self.union.load()

    def run(self, told: Told) -> None:
        """Copy what changes to where captured graphs read it, behind every step launched so far."""
        before, self.running = self.running, told
        if told.artifact is not None and told.artifact is not before.artifact:
            self.rule.write_matrices(told.artifact.layers, told.artifact.statistics)
        if told.bound.level != before.bound.level:
            self._write_masks()
        self.rule.write(told.bound)

    def _write_masks(self) -> None:
        """Of the running level; at level 0 no launch reads them."""
        assert self.masks is not None
        of_level = self.masks.level(self.bound.level, path=str(self.policy.masks))
        for layer, mask in of_level.items():
            if layer in self.mask_routers:  # the others are those of other pipeline stages
                self.mask_routers[layer].write(mask.weight)

    def write_again(self) -> None:
        """Write whatever steps read, behind memory that was away."""
        artifact = self.running.artifact
        if artifact is not None:
            self.rule.write_matrices(artifact.layers, artifact.statistics)
        self.rule.write_biases(self.gates.known)
        self.rule.write(self.bound)
        self.own.step_input.clear()

    def scores_of(self, layer: int, logits: Tensor) -> Tensor | None:
        """A gate's logits, if rules can read scores from them.

        Args:
            layer: decoder layer index.
            logits: ``[T, E]``.

        Raises:
            UnsupportedError: they cannot, and the running rule does.
        """
        if not reads_logits(logits):
            self.gates.give_up(layer, unreadable(logits))
        self.gates.check(self.policy)
        return logits if layer in self.gates.known else None

    def mask_logits_of(self, layer: int, logits: Tensor) -> Tensor | None:
        """``[T, E]``, what masks say of a layer's rows; None without masks.

        Args:
            layer: decoder layer index.
            logits: ``[T, E]``, the gate's of the same rows.

        Raises:
            UnsupportedError: of :meth:`MaskRouter.take_logits`.
        """
        if not self.rule.has_masks:
            return None
        return self.mask_routers[layer].take_logits(layer, logits)

    # --- a step -----------------------------------------------------------------------------------

    def begin_step(self, kinds: NDArray[np.int8], drafts: NDArray[np.int8] | None = None) -> None:
        """Take over the row kinds of a step that this rank re-routes alone.

        Args:
            kinds: ``[rows]`` int8 of the step that is launched next on this stream; rows of the
                pass beyond it are padding.
            drafts: ``[rows]`` int8 of :func:`sere_ray.engine.row_kinds.draft_positions`; None =
                there are none.
        """
        kind = self.step_kind(kinds)
        weights = self.row_weights(drafts)
        reroutable = self.own.step_input.write(kinds, kind, weights=weights)
        self.rule.settings.follow(reroutable)
        if reroutable:
            num_drafts = 0 if drafts is None else int(np.count_nonzero(drafts))
            self.count_step(kind, reroutable, len(kinds), draft_rows=num_drafts)

    def begin_dummy_step(self) -> None:
        """The next pass computes nobody's rows: leave it alone."""
        self.own.step_input.clear()

    # --- a layer ----------------------------------------------------------------------------------

    def reroute(
        self,
        layer: int,
        topk_ids: Tensor,
        topk_weights: Tensor,
        logits: Tensor | None,
        mask_logits: Tensor | None = None,
        *,
        sorts: bool,
    ) -> None:
        """Re-route the rows of the only rank in place: now, or when the experts sort them.

        Args:
            layer: decoder layer index.
            topk_ids: ``[T, K]``.
            topk_weights: ``[T, K]``.
            logits: of :meth:`scores_of`.
            mask_logits: of :meth:`mask_logits_of`.
            sorts: whether the experts sort these very ids.
        """
        of_layer = layer, topk_ids, topk_weights, logits, mask_logits
        if sorts and self.rule.sorts(topk_ids.shape[0]):
            self.hold(self.own.defer(*of_layer))
        else:
            self.own.reroute(*of_layer)

    def hold(self, held: Deferred) -> Routing:
        """Choose or re-route when the experts sort: :meth:`align` does it.

        Args:
            held: of :class:`OwnRows`.

        Returns:
            Its ``topk_weights`` float32 and ``topk_ids``, ``[T, K]`` each, not yet written.
        """
        self.deferred = held
        return held.topk_weights, held.topk_ids

    def align(
        self, topk_ids: Tensor, block_size: int, skips_foreign: bool = False
    ) -> Aligned | None:
        """Re-route the deferred ids in place and sort them.

        Args:
            topk_ids: ``[T, K]``.
            block_size: rows of the expert GEMM's tile.
            skips_foreign: slots of other ranks' experts are left out; one rank has none.

        Returns:
            None where vLLM has to sort: these ids are not deferred, or re-routed only, or blocks
            are of no power of two.
        """
        held = self.deferred
        if held is None or held.topk_ids.data_ptr() != topk_ids.data_ptr():
            return None
        self.deferred = None
        if block_size & (block_size - 1):  # Marlin's 48: our sorting shifts
            held.sort(_ANY_BLOCK, skips_foreign)
            return None
        return held.sort(block_size, skips_foreign)

    def check_nothing_deferred(self) -> None:
        """Whatever was deferred must have been sorted: else experts ran on the gate's ids.

        Raises:
            UnsupportedError: this vLLM sorts or gathers elsewhere.
        """
        if self.deferred is not None:
            raise UnsupportedError(
                f"sere: layer {self.deferred.layer} was computed without re-routing: vLLM's "
                "experts did not sort its ids where this version expects it; report this with "
                "the model's name"
            )
        if self.union is not None:
            self.union.check_nothing_expected()

    # --- counters ---------------------------------------------------------------------------------

    def read_layer_counters(self) -> NDArray[np.int64]:
        """Wait for the device; experts are those of all ranks, slots those of this rank's rows."""
        if self.union is not None and self.union.way == "gathered":
            return self.union.read_counters()
        counters: NDArray[np.int64] = self.own.counters.to("cpu", copy=True).numpy()
        counters = counters[:, self.rule.rows, :OWN_COUNTERS]
        replicated = all(runner.moe_config.ep_size == 1 for runner in self.attached.values())
        if self.union is None and replicated:
            return np.concatenate([counters, counters[:, :, :2]], axis=2)  # each rank reads all
        return counters

    def read_masked(self) -> list[list[int]]:
        """The last of ``MASKED_COUNTERS``; waits for the device."""
        if not self.rule.has_masks:
            return super().read_masked()
        masked: list[list[int]] = self.own.counters[:, :, -1].tolist()
        return masked

    def read_bytes(self) -> list[dict[str, list[int] | None]]:
        """With several ranks not counted: vLLM sends inside captured graphs."""
        if self.union is None:
            return super().read_bytes()
        return [dict.fromkeys(BYTES) for _ in range(2)]

    def add_to_report(self, report: dict[str, Any]) -> None:
        """With several ranks ``"gathered"``: see :meth:`UnionOfRanks.report`; and of how many
        workers the slots have to be added up, see :class:`RankGroup`."""
        if self.union is not None:
            report["gathered"] = self.union.report()
            report[SHARDS] = self.union.group.shards

    def reset_counters(self) -> None:
        """Also those on the device, behind every step launched so far."""
        super().reset_counters()
        self.own.counters.zero_()
        if self.union is not None:
            self.union.reset_counters()
