"""Right and wrong answers of a rule, item by item beside the exact model's on the same items."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sere_ray.evaluation.statistics import RESAMPLES, Estimate

Bools = NDArray[np.bool_]
_FEW = -math.log(0.025)
"""Of events that were never seen, fewer than these are expected at 97.5 % (Poisson)."""


@dataclass(frozen=True)
class Paired:
    """Both answers to n items. Items of one text are not independent, texts are."""

    exact: Bools
    """``[n]`` whether the exact model is right."""
    rule: Bools
    """``[n]`` whether the rule is."""
    text: NDArray[np.int64]
    """``[n]`` number of the text that the item is in."""

    @classmethod
    def join(cls, parts: "list[Paired]") -> "Paired":
        """The items of several; each numbers its own texts."""
        starts = np.cumsum([0, *(part.text.max(initial=-1) + 1 for part in parts)])
        texts = [part.text + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(
            np.concatenate([part.exact for part in parts]),
            np.concatenate([part.rule for part in parts]),
            np.concatenate(texts),
        )

    @property
    def lost(self) -> int:
        """Items that only the exact model has right."""
        return int((self.exact & ~self.rule).sum())

    @property
    def won(self) -> int:
        """Items that only the rule has right."""
        return int((~self.exact & self.rule).sum())

    def relative_loss(self) -> Estimate | None:
        """``(lost - won) / right_exact`` with its 95 % interval; None if exact is never right.

        The interval is the bootstrap's over texts, and at least as wide as 3.7 items to each
        side: where nothing flips the bootstrap has no width, but flips may be rare.
        """
        right = int(self.exact.sum())
        if not right:
            return None
        value = (self.lost - self.won) / right
        loss, of_exact = self._resampled()
        drawn = of_exact > 0
        found = Estimate.of(value, loss[drawn] / of_exact[drawn])
        least = _FEW / right
        return Estimate(value, min(found.low, value - least), max(found.high, value + least))

    def _resampled(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``[RESAMPLES]`` each: lost minus won, and right by the exact model, over drawn texts.

        Texts with the same two sums are alike, so how often each kind is drawn is enough.
        """
        texts = int(self.text.max()) + 1
        net = np.bincount(self.text, self.exact.astype(float) - self.rule, minlength=texts)
        right = np.bincount(self.text, self.exact, minlength=texts)
        pairs = np.stack([net, right], axis=1).astype(np.int64)
        kinds, counts = np.unique(pairs, axis=0, return_counts=True)
        generator = np.random.default_rng(0)
        drawn = generator.multinomial(texts, counts / texts, size=RESAMPLES)
        sums = drawn @ kinds
        return sums[:, 0], sums[:, 1]

    def half_width(self) -> float:
        """Half of the width of the relative loss's interval; infinite if exact is never right."""
        loss = self.relative_loss()
        return math.inf if loss is None else (loss.high - loss.low) / 2

    def items_needed(self, half_width: float) -> int | None:
        """How many items like these give a half-width; None if no number does."""
        now = self.half_width()
        return None if math.isinf(now) else math.ceil(len(self.exact) * (now / half_width) ** 2)


def mcnemar_p(lost: int, won: int) -> float:
    """McNemar's exact test, two-sided: how likely so uneven flips are if each is a fair coin.

    It takes items as independent; those of one text are not quite.
    """
    flips, fewer = lost + won, min(lost, won)
    ways = total = 1
    for i in range(fewer):
        ways = ways * (flips - i) // (i + 1)
        total += ways
    return min(1.0, 2 * total / (1 << flips))
