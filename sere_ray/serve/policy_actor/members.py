"""Which replicas follow the router actor, and how far they are."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sere_ray.serve.policy_actor.messages import Member


@dataclass
class _Seen:
    member: Member
    time: float


class Members:
    """Replicas by what each said in its last poll.

    Args:
        attached_seconds: one that has not polled for so long is gone.
    """

    def __init__(self, attached_seconds: float) -> None:
        self._attached_seconds = attached_seconds
        self._seen: dict[str, _Seen] = {}

    def see(self, member: Member) -> bool:
        """Take note of a poll; whether it said anything new."""
        known = self._seen.get(member.replica)
        self._seen[member.replica] = _Seen(member, time.monotonic())
        return known is None or known.member != member

    def still_here(self, replica: str) -> None:
        """It has waited in its poll until now."""
        if replica in self._seen:
            self._seen[replica].time = time.monotonic()

    def drop(self, replica: str) -> None:
        """It has taken its leave."""
        self._seen.pop(replica, None)

    def attached(self) -> dict[str, Member]:
        """Members that still poll. The siblings of a dead rank are replaced with it."""
        now = time.monotonic()
        self._seen = {
            replica: seen
            for replica, seen in self._seen.items()
            if now - seen.time < self._attached_seconds
        }
        return {replica: seen.member for replica, seen in self._seen.items()}

    def with_counters(self, counters: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Those attached, gang by gang; None for the counters of one that did not send any."""
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
        """Of those attached."""
        return {member.gang for member in self.attached().values()}

    def settled(self, version: int) -> int:
        """How many of those attached run this version or a newer one."""
        return sum(member.settled >= version for member in self.attached().values())

    def all_told(self, member: Member) -> bool:
        """Whether its whole gang was told its version, and it does not know that yet."""
        gang = [m for m in self.attached().values() if m.gang == member.gang]
        told = sum(m.staged >= member.staged for m in gang)
        return told == member.gang_size and member.staged > member.settled
