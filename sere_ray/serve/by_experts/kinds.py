"""Kinds of requests that were seen: what their texts are like, and which experts they wanted.

Texts in a few groups (k-means as texts come, MacQueen 1967), each with the mean signature of its
requests. From them the signature of a request is told before its prompt is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from sere_ray.engine.signatures import Floats, unit

MOST_KINDS = 24
NEW_BELOW = 0.75
"""A text less like every kind than this is the first of a new one, while there is a place."""
LEAST_LIKENESS = 0.35
"""A text less like every kind than this is of no kind that is known."""
MEMORY = 200.0
"""A kind's mean follows the last so many of its requests."""
CLOSE = 0.1
"""Kinds nearly as like a text as the nearest have a part in what is told."""


@dataclass
class Kind:
    """Requests with like texts: means of unit vectors, and how many they are."""

    text: Floats
    signature: Floats
    seen: float

    def add(self, text: Floats, signature: Floats) -> None:
        """One more request."""
        self.seen = min(self.seen + 1, MEMORY)
        self.text += (text - self.text) / np.float32(self.seen)
        self.signature += (signature - self.signature) / np.float32(self.seen)


class Kinds:
    """The kinds of one rank's requests so far, or of several ranks' together."""

    def __init__(self, kinds: Sequence[Kind] = ()) -> None:
        self.kinds = list(kinds)
        self._texts: Floats | None = None

    @property
    def usual(self) -> Floats:
        """``[D]`` mean signature over all requests; empty if none were seen."""
        if not self.kinds:
            return np.zeros(0, dtype=np.float32)
        total = sum(kind.seen for kind in self.kinds)
        mean: Floats = sum(
            (kind.signature * np.float32(kind.seen / total) for kind in self.kinds[1:]),
            self.kinds[0].signature * np.float32(self.kinds[0].seen / total),
        )
        return mean

    def add(self, text: Floats, signature: Floats) -> None:
        """A request was computed.

        Args:
            text: ``[T]`` of length 1.
            signature: ``[D]`` of length 1.
        """
        likeness = self._likeness(text)
        self._texts = None
        if likeness is None or (likeness.max() < NEW_BELOW and len(self.kinds) < MOST_KINDS):
            self.kinds.append(Kind(text.copy(), signature.copy(), 1.0))
        elif likeness.max() < LEAST_LIKENESS:
            rarest = min(range(len(self.kinds)), key=lambda i: self.kinds[i].seen)
            self.kinds[rarest] = Kind(text.copy(), signature.copy(), 1.0)
        else:
            self.kinds[int(likeness.argmax())].add(text, signature)

    def tell(self, text: Floats) -> Floats | None:
        """``[D]`` signature that a request with this text is likely to have; None = not known."""
        likeness = self._likeness(text)
        if likeness is None or likeness.max() < LEAST_LIKENESS:
            return None
        weights = np.clip(likeness - likeness.max() + CLOSE, 0, None)
        signatures = np.stack([kind.signature for kind in self.kinds])
        return unit((weights[:, None] * signatures).sum(axis=0).astype(np.float32))

    def _likeness(self, text: Floats) -> Floats | None:
        """Cosine of a text with the mean text of each kind, ``[kinds]``."""
        if not self.kinds or not text.any():
            return None
        if self._texts is None:
            self._texts = np.stack([unit(kind.text) for kind in self.kinds])
        found: Floats = self._texts @ text
        return found

    @classmethod
    def of_several(cls, parts: Sequence[Self]) -> "Kinds":
        """The kinds of several ranks, each as that rank has it."""
        return Kinds([kind for part in parts for kind in part.kinds])
