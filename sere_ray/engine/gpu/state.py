"""Re-routing on a GPU: one launch per layer, in eager passes and in captured graphs alike."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.engine.agreement import Told
from sere_ray.engine.back_end import Routing
from sere_ray.engine.gpu.device_rule import DeviceRule
from sere_ray.engine.gpu.own_rows import Deferred, OwnRows
from sere_ray.engine.gpu.rank_words import read_words, write_words
from sere_ray.engine.gpu.union import RankGroup, UnionOfRanks
from sere_ray.engine.state import BYTES, EngineState
from sere_ray.kernel.across_ranks import Placement
from sere_ray.kernel.alignment import Aligned
from sere_ray.kernel.limits import LOGIT_DTYPES, MAX_ALIGNED_ROWS, reads_logits
from sere_ray.policy.capabilities import EngineKind
from sere_ray.rules import REROUTABLE
from sere_ray.util.errors import UnsupportedError


@dataclass
class CudaState(EngineState):
    """Policies, steps and layers of one engine; rows are in device memory.

    Attributes:
        num_experts: E, logical experts.
        max_rows: most rows of a forward pass.
        device: of this worker.
        ranks: the data-parallel ranks of the engine; None = one.
        rule: matrices and the running policy's numbers.
        own: this rank's rows.
        union: the rows of all ranks; None = there is one.
        deferred: the layer that is computed now, if its ids are re-routed when they are sorted.
        exact_requests: running requests that ask for exact routing.
    """

    num_experts: int
    max_rows: int
    device: torch.device
    ranks: RankGroup | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Allocate everything graphs will point to; compile the kernels."""
        super().__post_init__()
        matrices = {layer: self.artifact.layers[layer] for layer in self.layers}
        self.rule = DeviceRule(matrices, self.top_k, self.num_experts, self.device, self.bound)
        self.own = OwnRows(self.rule, self.max_rows)
        self.union: UnionOfRanks | None = None
        if self.ranks is not None:
            self.union = UnionOfRanks(self.ranks, self.rule, self.max_rows)
        self.deferred: Deferred | None = None
        self.exact_requests: set[str] = set()

    @property
    def kind(self) -> EngineKind:
        """On a GPU."""
        return {"on_gpu": True, "several_ranks": self.ranks is not None}

    def run(self, told: Told) -> None:
        """Copy what changes to where captured graphs read it, behind every step launched so far."""
        if told.artifact is not self.running.artifact:
            self.rule.write_matrices(told.artifact.layers)
        self.running = told
        self.rule.write(told.bound)

    def write_again(self) -> None:
        """Write whatever steps read, behind memory that was away."""
        self.rule.write_matrices(self.running.artifact.layers)
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
        if layer not in self.without_scores and not reads_logits(logits):
            self.without_scores[layer] = (
                f"logits of {logits.dtype} with strides {logits.stride()}, where the kernels read "
                f"contiguous {' or '.join(str(dtype) for dtype in LOGIT_DTYPES)}"
            )
        self.check_scores(self.policy)
        return None if layer in self.without_scores else logits

    # --- a step -----------------------------------------------------------------------------------

    def begin_step(self, kinds: NDArray[np.int8]) -> None:
        """Take over the row kinds ``[rows]`` int8 of a step that this rank re-routes alone.

        It is launched next on this stream; rows of the pass beyond them are padding.
        """
        kind = self.step_kind(kinds)
        reroutable = self.own.step_input.write(kinds, kind)
        self.rule.settings.follow(reroutable)
        if reroutable:
            self.count_step(kind, reroutable, len(kinds))

    def begin_dummy_step(self) -> None:
        """The next pass computes nobody's rows: leave it alone."""
        self.own.step_input.clear()

    def words(self) -> NDArray[np.int32]:
        """What this rank tells the others before the pass that it is about to run."""
        versions, union = self.versions, self.union
        assert versions is not None
        assert union is not None
        self.check_nothing_deferred()
        return write_words(versions.newest, versions.checksum, union.next_kinds, self.max_rows)

    def begin_pass(self, table: NDArray[np.int32], sizes: list[int]) -> None:
        """Take over the row kinds of the pass that all ranks launch next.

        Args:
            table: ``[words, ranks]``: what each rank told.
            sizes: ``[ranks]`` rows of each rank in the pass, with padding.

        Raises:
            PolicyError: ranks were told different policies; on every rank alike.
        """
        assert self.union is not None
        ranks = [read_words(column) for column in table.T]
        versions = [of_rank.version for of_rank in ranks]
        same_checksum = len({of_rank.checksum for of_rank in ranks}) == 1
        self.run_common(min(versions), max(versions), same_checksum=same_checksum)
        kind, reroutable = self.union.begin_pass([of_rank.kinds for of_rank in ranks], sizes)
        mine = ranks[self.union.group.rank].kinds
        if self.bound.union == "local":
            self.begin_step(mine)
            return
        self.rule.settings.follow(reroutable)
        if reroutable:
            self.count_step(kind, int(np.count_nonzero(mine == REROUTABLE)), len(mine))
        if self.union.way != "gathered":
            self.own.step_input.write(mine, kind, reroutable=reroutable)

    # --- a layer ----------------------------------------------------------------------------------

    def reroute(
        self,
        layer: int,
        topk_ids: Tensor,
        topk_weights: Tensor,
        logits: Tensor | None,
        *,
        sorts: bool,
    ) -> None:
        """Re-route the rows of the only rank in place: now, or when the experts sort them.

        Args:
            layer: decoder layer index.
            topk_ids: ``[T, K]``.
            topk_weights: ``[T, K]``.
            logits: of :meth:`scores_of`.
            sorts: whether the experts sort these very ids.
        """
        if sorts and topk_ids.shape[0] <= MAX_ALIGNED_ROWS:
            self.deferred = self.own.defer(layer, topk_ids, topk_weights, logits)
        else:
            self.own.reroute(layer, topk_ids, topk_weights, logits)

    def defer_routing(
        self, layer: int, logits: Tensor, is_padding: Tensor | None, *, renormalize: bool
    ) -> Routing:
        """Choose and re-route when the experts sort: :meth:`align` fills what this returns.

        Args:
            layer: decoder layer index.
            logits: the gate's, ``[T, E]``, of which :meth:`OwnRows.can_route` is true.
            is_padding: ``[T]`` bool, rows that get ids of -1; None = none.
            renormalize: divide a row's weights by their sum.

        Returns:
            ``topk_weights`` float32 and ``topk_ids`` int32, ``[T, K]`` each, not yet written.
        """
        held = self.own.defer_routing(layer, logits, is_padding, renormalize=renormalize)
        self.deferred = held
        return held.topk_weights, held.topk_ids

    def route_layer(
        self,
        layer: int,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        placement: Placement | None,
        sorts: bool,
        logits: Tensor | None = None,
    ) -> None:
        """Where there are several ranks: re-route now, or when the ids of all are gathered.

        Args:
            layer: decoder layer index.
            topk_ids: ``[T, K]`` of this rank's rows.
            topk_weights: ``[T, K]``.
            placement: where experts are if ids will be gathered; None if they will not.
            sorts: whether the experts may be given gathered ids sorted.
            logits: of :meth:`scores_of`.

        Raises:
            UnsupportedError: other layers dispatch their rows in another way.
        """
        assert self.union is not None
        way = self.union.choose_way(layer, self.bound, gathers=placement is not None)
        if way == "before":
            own = self.own.layer(layer)
            self.union.reroute_before_dispatch(self.bound, own, topk_ids, topk_weights, logits)
        elif way == "local":
            self.own.reroute(layer, topk_ids, topk_weights, logits)
        if placement is not None:
            self.union.expect_ids(layer, placement, sorts=sorts)

    def take_gathered(self, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """Re-route the rows of all ranks: now, or when the experts ask for them sorted.

        Args:
            topk_ids: ``[T, K]`` of all ranks, in rank order.
            topk_weights: ``[T, K]``.
        """
        assert self.union is not None
        gathered = self.union.take_gathered(topk_ids, topk_weights)
        if gathered.sorts and topk_ids.shape[0] <= MAX_ALIGNED_ROWS:
            sort = partial(self.union.align, gathered)
            self.deferred = Deferred(gathered.layer, topk_ids, topk_weights, sort)
        else:
            self.union.reroute(gathered)

    def align(
        self, topk_ids: Tensor, block_size: int, skips_foreign: bool = False
    ) -> Aligned | None:
        """Re-route the deferred ids in place and sort them.

        Args:
            topk_ids: ``[T, K]``.
            block_size: rows of the expert GEMM's tile.
            skips_foreign: slots of other ranks' experts are left out; one rank has none.

        Returns:
            None where vLLM has to sort: these ids are not deferred, or re-routed only.
        """
        held = self.deferred
        if held is None or held.topk_ids.data_ptr() != topk_ids.data_ptr():
            return None
        self.deferred = None
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
        replicated = all(runner.moe_config.ep_size == 1 for runner in self.attached.values())
        if self.union is None and replicated:
            return np.concatenate([counters, counters[:, :, :2]], axis=2)  # each rank reads all
        return counters

    def read_bytes(self) -> list[dict[str, list[int] | None]]:
        """With several ranks not counted: vLLM sends inside captured graphs."""
        if self.union is None:
            return super().read_bytes()
        return [dict.fromkeys(BYTES) for _ in range(2)]

    def add_to_report(self, report: dict[str, Any]) -> None:
        """With several ranks ``"gathered"``: see :meth:`UnionOfRanks.report`."""
        if self.union is not None:
            report["gathered"] = self.union.report()

    def reset_counters(self) -> None:
        """Also those on the device, behind every step launched so far."""
        super().reset_counters()
        self.own.counters.zero_()
        if self.union is not None:
            self.union.reset_counters()
