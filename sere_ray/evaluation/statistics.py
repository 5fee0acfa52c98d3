"""Means and intervals of measured settings. Texts are resampled: all their positions together."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sere_ray.evaluation.decode_batches import Measured

Doubles = NDArray[np.float64]
RESAMPLES = 1000
_RESAMPLES_P99 = 200


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: Doubles) -> "Estimate":
        """A number with the interval of 95 % of the same number in each resample."""
        low, high = np.percentile(resampled, [2.5, 97.5])
        return cls(float(value), float(low), float(high))

    def fields(self, name: str, digits: int) -> dict[str, float | list[float]]:
        """The fields ``name`` and ``name_95`` of a row of a result, rounded."""
        return {
            name: round(self.value, digits),
            f"{name}_95": [round(self.low, digits), round(self.high, digits)],
        }


def draws(texts: int, resamples: int = RESAMPLES) -> Doubles:
    """``[resamples, texts]``: how often each text is in each resample, as a share.

    The same for every setting, so that settings can be compared resample by resample.
    """
    generator = np.random.default_rng(0)
    picks = generator.integers(0, texts, (resamples, texts))
    counts = np.stack([np.bincount(row, minlength=texts) for row in picks])
    return counts / texts


def mean(of_texts: NDArray[np.floating], shares: Doubles) -> Estimate:
    """The mean over N texts, with its interval.

    Args:
        of_texts: ``[N]``, or ``[N, D]`` with D positions of each text.
        shares: ``[resamples, N]``, from :func:`draws`.
    """
    per_text = of_texts.astype(np.float64).reshape(len(of_texts), -1).mean(axis=1)
    return Estimate.of(per_text.mean(), shares @ per_text)


def summarise(found: Measured, shares: Doubles) -> dict[str, float | list[float]]:
    """The fields of a result's row that do not depend on the number of ranks."""
    loss = mean(found.loss, shares)
    perplexity = Estimate(*(float(np.exp(x)) for x in (loss.value, loss.low, loss.high)))
    return {
        **mean(found.reads, shares).fields("experts_read_mean", 3),
        **mean(found.rows_share, shares).fields("expert_rows_share", 4),
        **mean(found.kl, shares).fields("kl_mean", 5),
        **percentile99(found.kl).fields("kl_p99", 4),
        **_tail(found),
        **mean(found.agreement, shares).fields("top1_agreement", 4),
        **perplexity.fields("perplexity", 3),
    }


def _tail(found: Measured) -> dict[str, float]:
    """The further numbers that llama.cpp's perplexity tool prints, without intervals."""
    median, p999 = np.percentile(found.kl, [50, 99.9])
    rms = np.sqrt(np.square(found.delta_p, dtype=np.float64).mean())
    return {
        "kl_median": round(float(median), 6),
        "kl_p999": round(float(p999), 4),
        "kl_max": round(float(found.kl.max()), 4),
        "delta_p_rms": round(float(rms), 5),
    }


def percentile99(of_positions: NDArray[np.floating]) -> Estimate:
    """The 99th percentile over all positions ``[N, D]``, with its interval over texts."""
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(of_positions), (_RESAMPLES_P99, len(of_positions)))
    resampled = np.array([np.percentile(of_positions[pick], 99) for pick in picks])
    return Estimate.of(float(np.percentile(of_positions, 99)), resampled)
