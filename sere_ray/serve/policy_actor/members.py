"""The replicas that follow the policy actor: what both say to each other, and how far each is."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Update:
    """One version: what a replica hands to its engine."""

    version: int
    policy: dict[str, Any]
    sha256: str
    """Hash of the artifact's file."""
    content: Any = None
    """Object reference of the file's bytes; None in a version that keeps the artifact."""
    masks_sha256: str = ""
    """Hash of the file of masks; empty = there is none, or the replica has it."""
    masks: Any = None
    """Object reference of that file's bytes, for a replica that starts."""


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
    """Newest version that all ranks of its gang were told, as far as it knows."""
    counters: dict[str, Any] | None = None
    """Counters of its engine, if the policy actor asked for them."""


@dataclass(frozen=True)
class Order:
    """What the policy actor answers: what the replica has to do."""

    updates: list[Update] = field(default_factory=list)
    settle: int = 0
    """Version that all ranks of the gang were told; 0 = nothing new."""
    report: bool = False
    """Send counters with the next poll."""
    restart: bool = False
    """Too far behind to follow."""


@dataclass
class _Seen:
    member: Member
    time: float


class Members:
    """The replicas that follow, by what each said in its last poll.

    Args:
        attached_seconds: a replica that has not polled for so long counts as gone.
    """

    def __init__(self, attached_seconds: float) -> None:
        self._attached_seconds = attached_seconds
        self._seen: dict[str, _Seen] = {}

    def see(self, member: Member) -> bool:
        """Take note of a poll; returns whether it said anything new."""
        known = self._seen.get(member.replica)
        self._seen[member.replica] = _Seen(member, time.monotonic())
        return known is None or known.member != member

    def still_here(self, replica: str) -> None:
        """The replica has waited in its poll until now, so it is not gone."""
        if replica in self._seen:
            self._seen[replica].time = time.monotonic()

    def drop(self, replica: str) -> None:
        """Forget a replica that has taken its leave."""
        self._seen.pop(replica, None)

    def attached(self) -> dict[str, Member]:
        """What each replica that still polls said last, by its name."""
        now = time.monotonic()
        self._seen = {
            replica: seen
            for replica, seen in self._seen.items()
            if now - seen.time < self._attached_seconds
        }
        return {replica: seen.member for replica, seen in self._seen.items()}

    def with_counters(self, counters: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Replicas that still poll, gang by gang, each with its counters (None: it sent none)."""
        return [
            {
                "replica": m.replica,
                "gang": m.gang,
                "rank": m.rank,
                "version": m.staged,
                "counters": counters.get(m.replica),
            }
            for m in sorted(self.attached().values(), key=lambda m: (m.gang, m.rank))
        ]

    def gangs(self) -> set[str]:
        """Ids of the gangs of which a replica still polls."""
        return {member.gang for member in self.attached().values()}

    def settled(self, version: int) -> int:
        """How many of the replicas that still poll run this version or a newer one."""
        return sum(member.settled >= version for member in self.attached().values())

    def all_told(self, member: Member) -> bool:
        """Whether the whole gang of a replica was told its version, but it does not know yet."""
        gang = [m for m in self.attached().values() if m.gang == member.gang]
        told = sum(m.staged >= member.staged for m in gang)
        return told == member.gang_size and member.staged > member.settled


class Gangs:
    """Gangs by id. A gang restarts as a whole, under a new id."""

    def __init__(self) -> None:
        self._met: set[str] = set()
        self._start: dict[str, Update] = {}
        self._left: dict[str, set[str]] = {}

    def meet(self, gang: str) -> int | None:
        """Take note of a gang: how many there have been, if this one is new; else None."""
        if gang in self._met:
            return None
        self._met.add(gang)
        return len(self._met)

    def start(self, gang: str, alive: set[str], newest: Callable[[], Update]) -> Update:
        """The version that the ranks of a gang start with: the same for all of them.

        Args:
            gang: of the rank that asks.
            alive: gangs that follow now. Others are forgotten, but for a few that may be starting.
            newest: makes the newest version; called for the first rank of a gang.
        """
        if gang not in self._start:
            for old in [g for g in self._start if g not in alive][:-8]:
                del self._start[old]
                self._left.pop(old, None)
            self._start[gang] = newest()
        return self._start[gang]

    def leave(self, gang: str, replica: str) -> set[str]:
        """Replicas of a gang that have taken their leave, this one included."""
        left = self._left.setdefault(gang, set())
        left.add(replica)
        return left
