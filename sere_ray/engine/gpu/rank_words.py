"""What a data-parallel rank tells the others before a pass, as 32-bit words. Pure numpy."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sere_ray.rules import EXACT, REROUTABLE

_HEADER = 3


class RankWords(NamedTuple):
    """One rank's part."""

    version: int
    """Policies set so far."""
    checksum: int
    """Of the artifact and of all of them, 32 bits."""
    kinds: NDArray[np.int8]
    """``[rows]`` of ``REROUTABLE`` and ``EXACT``; none in a dummy pass."""


def write_words(
    version: int, checksum: int, kinds: NDArray[np.int8], max_rows: int
) -> NDArray[np.int32]:
    """A header and a bit for each row, as many words whatever the pass.

    Returns:
        ``[words]`` int32.
    """
    bits = np.zeros(-(-max_rows // 32) * 32, dtype=np.bool_)
    bits[: len(kinds)] = kinds == REROUTABLE
    header = np.array([version, checksum, len(kinds)], dtype=np.uint32)
    return np.concatenate((header, np.packbits(bits).view(np.uint32))).view(np.int32)


def read_words(words: NDArray[np.int32]) -> RankWords:
    """The inverse of :func:`write_words`."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    version, checksum, rows = (int(word) for word in unsigned[:_HEADER])
    bits = np.unpackbits(unsigned[_HEADER:].view(np.uint8), count=rows)
    return RankWords(version, checksum, np.where(bits, REROUTABLE, EXACT).astype(np.int8))
