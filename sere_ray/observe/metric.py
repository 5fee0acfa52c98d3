"""What a metric of sere-ray is: its name, type, labels, and what it counts."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Source = Literal["replica", "policy actor", "ingress"]
RANK_LABELS = ("app", "gang", "rank", "ReplicaId")
"""Labels of what a rank exports."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: without Ray's prefix.
        kind: Prometheus type.
        unit: of its value.
        labels: keys that sere-ray sets.
        formula: what it counts and how.
        source: the process that exports it.
        boundaries: upper bounds of a histogram's buckets.
    """

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    formula: str
    source: Source = "replica"
    boundaries: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name in Prometheus; a histogram's series end in _bucket, _count and _sum."""
        return f"ray_{self.name}"
