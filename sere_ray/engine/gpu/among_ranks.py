"""What an engine on a GPU does where there are several ranks: a pass, and a layer's dispatch."""

from abc import abstractmethod
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.engine.gpu.device_rule import DeviceRule
from sere_ray.engine.gpu.own_rows import Deferred, OwnRows
from sere_ray.engine.gpu.rank_words import read_words, write_words
from sere_ray.engine.gpu.union import UnionOfRanks
from sere_ray.engine.state import EngineState
from sere_ray.kernel.across_ranks import Placement
from sere_ray.rules import REROUTABLE


class AmongRanks(EngineState):
    """A part of :class:`sere_ray.engine.gpu.state.CudaState`, which has the attributes."""

    max_rows: int
    rule: DeviceRule
    own: OwnRows
    union: UnionOfRanks | None
    deferred: Deferred | None

    @abstractmethod
    def begin_step(self, kinds: NDArray[np.int8]) -> None:
        """Take over the row kinds of a step that this rank re-routes alone."""

    @abstractmethod
    def check_nothing_deferred(self) -> None:
        """Whatever was deferred must have been sorted."""

    def words(self) -> NDArray[np.int32]:
        """What this data-parallel rank tells the others before the pass that it is about to run.

        Its tensor-parallel workers tell the same, each in a sum of its own: they are told a policy
        between the same two passes.
        """
        versions, union = self.versions, self.union
        assert versions is not None
        assert union is not None
        self.check_nothing_deferred()
        return write_words(versions.newest, versions.checksum, union.next_kinds, self.max_rows)

    def begin_pass(self, table: NDArray[np.int32], sizes: list[int]) -> None:
        """Take over the row kinds of the pass that all ranks launch next.

        Args:
            table: ``[words, ranks]``: what each data-parallel rank told.
            sizes: ``[ranks]`` rows of each of them in the pass, with padding.

        Raises:
            PolicyError: ranks were told different policies; on every rank alike.
        """
        assert self.union is not None
        ranks = [read_words(column) for column in table.T]
        versions = [of_rank.version for of_rank in ranks]
        same_checksum = len({of_rank.checksum for of_rank in ranks}) == 1
        self.run_common(min(versions), max(versions), same_checksum=same_checksum)
        group, kinds = self.union.group, [of_rank.kinds for of_rank in ranks]
        whole = kinds[group.data_rank]
        of_ranks, rows = group.layout(kinds, sizes)
        kind, reroutable = self.union.begin_pass(of_ranks, rows)
        mine = of_ranks[group.rank]
        if self.bound.union == "local":
            self.begin_step(mine)
            return
        self.rule.settings.follow(reroutable)
        if reroutable:
            self.count_step(kind, int(np.count_nonzero(whole == REROUTABLE)), len(whole))
        if self.union.way != "gathered":
            self.own.step_input.write(mine, kind, reroutable=reroutable)

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
            own, owner = self.own.layer(layer), self.union.owners.get(layer)
            rows = topk_ids, topk_weights, logits
            self.union.reroute_before_dispatch(self.bound, own, *rows, owner)
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
        if gathered.sorts and self.rule.sorts(topk_ids.shape[0]):
            sort = partial(self.union.align, gathered)
            self.deferred = Deferred(gathered.layer, topk_ids, topk_weights, sort)
        else:
            self.union.reroute(gathered)
