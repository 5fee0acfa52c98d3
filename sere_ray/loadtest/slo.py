"""What a request must keep, what the machines cost, and whether a result is good enough."""

from dataclasses import dataclass
from typing import Any

from sere_ray.loadtest.client import Outcome
from sere_ray.util.errors import SereError


@dataclass(frozen=True)
class Slo:
    """What a request must keep to count for goodput; milliseconds, None = any."""

    ttft: float | None = None
    tpot: float | None = None
    latency: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """Read ``ttft=500,tpot=50``, in milliseconds; the empty text asks for nothing.

        Raises:
            SereError: another form.
        """
        limits: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            try:
                limits[name] = float(value)
            except ValueError:
                limits[name] = 0.0
            if name not in ("ttft", "tpot", "latency") or not limits[name] > 0:
                raise SereError(
                    f"--slo: {part!r}: must be ttft, tpot or latency = milliseconds above 0, "
                    "such as ttft=500,tpot=50"
                )
        return cls(**limits)

    def kept_by(self, outcome: Outcome) -> bool:
        """Whether a request kept every limit; a failed one never does."""
        if outcome.error is not None:
            return False
        taken = (outcome.ttft, outcome.tpot or 0.0, outcome.latency)
        limits = (self.ttft, self.tpot, self.latency)
        pairs = zip(taken, limits, strict=True)
        return all(limit is None or seconds * 1e3 <= limit for seconds, limit in pairs)

    def __str__(self) -> str:
        limits = [f"{n} <= {v:g} ms" for n, v in vars(self).items() if v is not None]
        return ", ".join(limits) or "none: every answered request counts"


@dataclass(frozen=True)
class Price:
    """What the machines cost while the load ran."""

    usd_per_gpu_hour: float
    gpus: int = 1

    def usd_per_million(self, tokens_per_s: float) -> float | None:
        """Dollars for a million output tokens at this rate; None where there are no tokens."""
        if tokens_per_s <= 0:
            return None
        return self.usd_per_gpu_hour * self.gpus / (3600 * tokens_per_s) * 1e6


def broken_slo(content: dict[str, Any], least: float) -> list[str]:
    """One line for each policy of a result whose share of requests within the SLO is too small.

    Args:
        content: of a result file.
        least: share of requests that must keep the SLO, 0..1.
    """
    return [
        f"{row['policy'] or 'the endpoint'}: {row['slo_kept']} of the requests kept the SLO "
        f"({content['slo']}), {least} are required"
        for row in content["rows"]
        if (row["slo_kept"] or 0) < least
    ]


def check_generator(content: dict[str, Any], limit_ms: float) -> None:
    """Refuse a result whose generator could not keep up.

    Args:
        content: of a result file.
        limit_ms: how late the generator's event loop may have been (99th percentile).

    Raises:
        SereError: it was later than that.
    """
    worst = max(row["generator_lag_ms_p99"] or 0.0 for row in content["rows"])
    if worst > limit_ms:
        raise SereError(
            f"the generator was saturated: its event loop came back {worst:g} ms late (p99), "
            f"--max-lag-ms allows {limit_ms:g}; use --processes, another machine, or less load"
        )
