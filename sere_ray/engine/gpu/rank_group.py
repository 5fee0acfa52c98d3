"""The ranks of a GPU engine over which one union is taken, as one of them reaches the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.kernel.peers import Peers


@dataclass(frozen=True)
class RankGroup:
    """The ranks whose rows vLLM gathers for a layer's experts, in that order.

    With data parallelism alone these are its ranks. With tensor parallelism beside it vLLM does one
    of two things with the rows of a data-parallel rank, which all of its GPUs have after attention:
    it cuts them into as many shards as there are GPUs, and every GPU routes one (``shards`` of
    them; the ranks are then all GPUs, those of a data-parallel rank next to each other); or every
    GPU routes all of them alike (one shard; the ranks are the GPUs with one place in their
    data-parallel ranks).

    Attributes:
        rank: of this worker.
        num_ranks: how many there are.
        exchange: the minimum over ranks of a uint8 tensor, in place, on the current stream.
        add_up: the sum over ranks of an int64 tensor, in place, on the current stream.
        connect: what a kernel needs to exchange by itself, None where it cannot; a collective call.
        before_dispatch: take the way ``before`` also where vLLM gathers.
        shards: into how many the rows of a data-parallel rank are cut.
    """

    rank: int
    num_ranks: int
    exchange: Callable[[Tensor], None]
    add_up: Callable[[Tensor], None]
    connect: Callable[[], Peers | None]
    before_dispatch: bool = False
    shards: int = 1

    @property
    def data_rank(self) -> int:
        """The data-parallel rank: the one that has requests, and a column in vLLM's table."""
        return self.rank // self.shards

    def layout(
        self, kinds: Sequence[NDArray[np.int8]], sizes: Sequence[int]
    ) -> tuple[list[NDArray[np.int8]], list[int]]:
        """Which rows each rank routes: shards are equally long, the last of them padded.

        Args:
            kinds: of each data-parallel rank, ``[rows]`` int8.
            sizes: rows of each of them in the pass, with padding.

        Returns:
            Both, of each rank.
        """
        lengths = [-(-size // self.shards) for size in sizes]
        of_shards = [
            of_rank[shard * length : (shard + 1) * length]
            for of_rank, length in zip(kinds, lengths, strict=True)
            for shard in range(self.shards)
        ]
        return of_shards, [length for length in lengths for _ in range(self.shards)]
