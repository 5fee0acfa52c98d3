"""What data-parallel ranks of a CPU engine exchange, so that all keep the same experts.

Under data and expert parallelism every rank routes its own rows. Two all-reduces make all of them
derive the same set of kept experts:

- once per pass, in its first MoE layer: :class:`Header`, a few numbers, and each rank's rows (MIN);
- in every MoE layer, before rows are dispatched: one byte per expert, the lowest slot order in
  which a row names it (MIN); under the rule ``margin`` one integer per expert, what the
  rank's rows ask for (SUM).

vLLM already runs a pass on all ranks or on none, since dispatch is a collective too: an idle rank
runs dummy passes, warm-up included. So a dummy pass takes part here (``patches.py``) and names
nothing, and a collective that is left out is left out by all ranks for a reason they share.
"""

import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sere_ray.dispatch import Greeting, naming_missing_ranks
from sere_ray.util.errors import SereError

_NO_ROWS = 2**31
"""Above every number of rows."""


class Header(NamedTuple):
    """What ranks agree on once per pass: the minimum over ranks of each field."""

    version: int
    """Policies set so far; the lowest is the newest that every rank knows."""
    minus_version: int
    checksum: int
    """Of the artifact and of all policies set so far."""
    minus_checksum: int
    no_decode_row: int
    """0 if the rank has a re-routable row, else 1."""
    no_exact_row: int
    """0 if the rank has an exact row, else 1."""


class PassOfRanks(NamedTuple):
    """What a rank learns of a pass."""

    lowest_version: int
    highest_version: int
    same_checksum: bool
    decodes: bool
    """Whether any rank has a re-routable row."""
    is_mixed: bool
    """Whether any rank has an exact row."""
    decode_rows: int
    """Re-routable rows of all ranks."""


@dataclass
class UnionOfRanks:
    """Exchanges of one rank with the others; every method is a collective call.

    Attributes:
        group: the expert-parallel group, one rank per data-parallel rank.
        greeting: how to name ranks that are gone; None leaves torch's errors as they are.
        compares: whether ranks compare what each derived, in every layer (``check_ranks``).
    """

    group: dist.ProcessGroup
    greeting: Greeting | None = None
    compares: bool = False
    _version: int = field(default=0, init=False)

    def agree(
        self, version: int, checksum: int, decode_rows: int, *, has_exact_row: bool
    ) -> PassOfRanks:
        """Exchange headers, in the first layer of a pass, where all ranks are in step.

        Args:
            version: of the newest policy that this rank was told.
            checksum: of all of them.
            decode_rows: re-routable rows of this rank.
            has_exact_row: whether it has an exact one.
        """
        mine = Header(
            version, -version, checksum, -checksum, int(decode_rows == 0), int(not has_exact_row)
        )
        # A place for each rank, which it alone fills: the minimum has the rows of all of them.
        rows = [_NO_ROWS] * self.group.size()
        rows[dist.get_rank(self.group)] = decode_rows
        fields = torch.tensor([*mine, *rows], dtype=torch.int64, device="cpu")
        self.take_minimum(fields)
        common = Header(*fields[: len(mine)].tolist())
        self._version = common.version
        return PassOfRanks(
            common.version,
            -common.minus_version,
            common.checksum == -common.minus_checksum,
            not common.no_decode_row,
            not common.no_exact_row,
            int(fields[len(mine) :].sum()),
        )

    def take_minimum(self, numbers: Tensor) -> None:
        """The minimum over ranks of each number, in place."""
        self._reduce(numbers, dist.ReduceOp.MIN)

    def add_up(self, numbers: Tensor) -> None:
        """The sum over ranks of each number, in place."""
        self._reduce(numbers, dist.ReduceOp.SUM)

    def compare(self, layer: int, derived: Tensor) -> None:
        """Compare what ranks derived in a layer.

        Args:
            layer: decoder layer index.
            derived: any numbers that must be the same on all ranks, contiguous.

        Raises:
            SereError: they differ; on every rank alike.
        """
        checksum = zlib.crc32(derived.numpy().tobytes())
        fields = torch.tensor([checksum, -checksum], dtype=torch.int64, device="cpu")
        self.take_minimum(fields)
        if fields[0] != -fields[1]:
            raise SereError(
                f"sere.check_ranks: ranks re-route layer {layer} differently under policy number "
                f"{self._version}; their answers are wrong from here on: restart them, and "
                "report this"
            )

    def _reduce(self, numbers: Tensor, operation: Any) -> None:
        with naming_missing_ranks(self.group, self.greeting):
            dist.all_reduce(numbers, operation, group=self.group)
