"""Which policy all ranks of an engine run: the newest one that each of them was told.

A policy reaches the ranks one after the other, while passes go on. So a rank numbers what it is
told and keeps it, and before every pass ranks exchange the number of their newest policy and a
checksum of all of them. From the first pass on before which every rank was told, all switch.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.masks.artifact import MasksArtifact
from sere_ray.policy.bound import BoundPolicy
from sere_ray.util.errors import PolicyError


class Told(NamedTuple):
    """What an engine is told to run."""

    bound: BoundPolicy
    artifact: SimilarityArtifact | None
    masks: MasksArtifact | None = None


class Versions:
    """What a rank was told, by number, from the version on that all ranks run.

    All ranks must be told the same in the same order.

    Attributes:
        newest: number of the last one; the first is 0.
        told: by number; earlier ones than all ranks know are gone.
        checksum: 32 bits, of the first files and of all that was told.
    """

    def __init__(self, first: Told) -> None:
        self.newest = 0
        self.told = {0: first}
        self.checksum = zlib.crc32(first.bound.model_dump_json().encode())
        for tensor in _tensors(first):
            content = tensor.contiguous().cpu().numpy().tobytes()
            self.checksum = zlib.crc32(content, self.checksum)

    def check_alike(self, group: ProcessGroup) -> None:
        """Refuse other files on workers of one data-parallel rank; a collective call of theirs.

        What they are told later comes by one call for all of them, between the same two passes.

        Args:
            group: of the workers, for messages between their hosts.

        Raises:
            PolicyError: they have not the same; on every worker alike.
        """
        both = torch.tensor([self.checksum, -self.checksum])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        if int(both[0]) != -int(both[1]):
            raise PolicyError(
                "sere: tensor-parallel workers of a data-parallel rank differ in their 'sere' key "
                "or in their similarity artifact; give all of them the same files"
            )

    def add(self, told: Told, artifact: bytes | None) -> None:
        """Number what this rank is told.

        Args:
            told: to run, once all ranks know it.
            artifact: the file that it came with; None = the artifact stayed.
        """
        self.newest += 1
        self.told[self.newest] = told
        self.checksum = zlib.crc32(told.bound.model_dump_json().encode(), self.checksum)
        self.checksum = zlib.crc32(artifact or b"", self.checksum)

    def common(self, lowest: int, highest: int, *, same_checksum: bool) -> Told:
        """The newest that all ranks were told.

        Args:
            lowest: of the ranks' ``newest``.
            highest: of them.
            same_checksum: whether ``checksum`` is the same on all ranks.

        Raises:
            PolicyError: ranks were told as many, but not the same. It is raised on every rank
                alike, so that none is left waiting.
        """
        if lowest == highest and not same_checksum:
            raise PolicyError(
                f"sere: data-parallel ranks differ in their policies (number {lowest}) or "
                "in their similarity artifact or masks; start all ranks with the same 'sere' key "
                "and set the same policies on all of them, in the same order"
            )
        self.told = {number: told for number, told in self.told.items() if number >= lowest}
        return self.told[lowest]


def _tensors(told: Told) -> Iterator[Tensor]:
    """All that the files hold, in one order."""
    if told.artifact is not None:
        for layer, matrix in sorted(told.artifact.layers.items()):
            yield matrix
            for _, tensor in sorted(told.artifact.statistics.get(layer, {}).items()):
                yield tensor
    if told.masks is not None:
        for _, of_level in sorted(told.masks.weights.items()):
            for _, weight in sorted(of_level.items()):
                yield weight
