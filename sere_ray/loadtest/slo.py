"""What a request must keep, and what the machines cost."""

from dataclasses import dataclass

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
        """Of ``ttft=500,tpot=50``.

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
        """Whether a request kept it; a failed one never does."""
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
        """Dollars for a million output tokens at this rate; None without any."""
        if tokens_per_s <= 0:
            return None
        return self.usd_per_gpu_hour * self.gpus / (3600 * tokens_per_s) * 1e6
