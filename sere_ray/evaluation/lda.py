"""LDA's repair of a layer that runs fewer experts (arXiv 2609.09241; by summaries, no code is out).

Running fewer experts changes scale and variance of a layer's output. So it is mapped, dimension by
dimension, to the mean and standard deviation that the exact output has on calibration text; both
outputs are taken from the same inputs, with all earlier layers exact.

Left open by the text at hand, and ours: the output is that of the routed experts, without shared
ones; rows that nothing was changed for are mapped, too; a re-routed layer depends on its batch, so
there is a map for each setting and batch size, where the paper has one for each number of experts.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Affine = tuple[Tensor, Tensor]
"""Scale and shift, ``[H]`` float32 each: y becomes scale y + shift."""
Repair = Mapping[int, Affine]
"""By decoder layer."""


class Moments:
    """Sums over rows of a layer's exact and changed output, by dimension; they add up."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums: Tensor | None = None
        """``[2, 2, H]`` float64: exact, changed; values, squares."""

    def add(self, exact: Tensor, changed: Tensor) -> None:
        """Add rows ``[n, H]`` of both outputs."""
        both = torch.stack([exact, changed]).double()
        self._add(len(exact), torch.stack([both.sum(dim=1), both.square().sum(dim=1)], dim=1))

    def _add(self, rows: int, sums: Tensor) -> None:
        self.rows += rows
        self.sums = sums if self.sums is None else self.sums + sums

    @classmethod
    def merge(cls, parts: "Iterable[Moments]") -> "Moments":
        """The sums over the rows of all."""
        merged = cls()
        for part in parts:
            if part.sums is not None:
                merged._add(part.rows, part.sums)
        return merged

    def affine(self) -> Affine:
        """The map; a dimension that does not vary is shifted alone."""
        assert self.sums is not None
        mean, square = self.sums[:, 0] / self.rows, self.sums[:, 1] / self.rows
        exact, changed = (square - mean.square()).clamp(min=0)
        scale = torch.where(changed > 0, (exact / changed).sqrt(), 1.0)
        return scale.float(), (mean[0] - scale * mean[1]).float()
