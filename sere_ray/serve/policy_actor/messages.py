"""What a replica and the router actor say to each other."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Update:
    """One version: what a replica hands to its engine."""

    version: int
    policy: dict[str, Any]
    sha256: str
    """Of the artifact's file."""
    content: Any = None
    """Object reference of the file's bytes; None in a version that keeps the artifact."""


@dataclass(frozen=True)
class Member:
    """What a replica says when it polls."""

    replica: str
    gang: str
    gang_size: int
    rank: int
    staged: int
    """Newest version its engine was told."""
    settled: int
    counters: dict[str, Any] | None = None
    """Of the engine, if the router asked for them."""


@dataclass(frozen=True)
class Order:
    """What the router answers."""

    updates: list[Update] = field(default_factory=list)
    settle: int = 0
    """Version that all ranks of the gang were told; 0 = nothing new."""
    report: bool = False
    """Send counters with the next poll."""
    restart: bool = False
    """Too far behind to follow."""
