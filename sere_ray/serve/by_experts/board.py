"""What a request router knows of the ranks: their reports, and what it has placed since.

Bounded, and lost without harm: the next reports, a second later, bring all of it but the latest
placements.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sere_ray.engine.signatures import DIMENSIONS, Floats
from sere_ray.serve.by_experts.kinds import Kinds
from sere_ray.serve.by_experts.placement import Gang, ranked
from sere_ray.serve.by_experts.report import KEY, Report

STALE_SECONDS = 10.0
"""A rank that has not reported for so long may have other requests by now."""
LAG_SECONDS = 0.3
"""A report is so old when Ray brings it: what was placed since may not be in it. (It carries no
time, as clocks of nodes differ. So the last report of a rank that hangs looks new to a router that
starts then, until it is ``STALE_SECONDS`` old here.)"""
MOST_PLACED = 512
"""Placements remembered of a rank between two reports."""


class NotKnown(Exception):
    """Why a request cannot be placed by experts, in words for the log."""


@dataclass
class _Rank:
    report: Report
    content: Mapping[str, Any]
    arrived: float
    placed: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_PLACED))

    @property
    def load(self) -> int:
        """Requests that it had when it reported, and those that it may not have counted then."""
        while self.placed and self.placed[0] < self.arrived - LAG_SECONDS:
            self.placed.popleft()
        return self.report.load + len(self.placed)


class Board:
    """The ranks that a request may go to.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ranks: dict[str, _Rank] = {}
        self._kinds: Kinds | None = None
        self._usual = np.zeros(DIMENSIONS, dtype=np.float32)

    def see(self, stats: Mapping[str, Mapping[str, Any]]) -> None:
        """Take what Ray carries of the ranks there are now, by their names.

        A report's age counts from the first call that has it: call this whenever Ray brings
        something, not only when a request comes.

        Raises:
            NotKnown: one has no report, an old one, or one of another model.
        """
        now = self._clock()
        for gone in set(self._ranks) - set(stats):
            del self._ranks[gone]
            self._kinds = None
        for name, carried in stats.items():
            known, content = self._ranks.get(name), carried.get(KEY)
            if known is not None and known.content is content:
                continue
            report = Report.read(carried)
            if report is None:
                self._ranks.pop(name, None)
                continue
            if known is None:
                self._ranks[name] = _Rank(report, content or {}, now)
            elif known.report.number != report.number:
                self._ranks[name] = _Rank(report, content or {}, now, known.placed)
            self._kinds = None
        if missing := set(stats) - set(self._ranks):
            raise NotKnown(f"{len(missing)} of {len(stats)} replicas have not reported yet")
        if len({rank.report.model for rank in self._ranks.values()}) > 1:
            raise NotKnown("replicas report signatures of different models")
        if any(now - rank.arrived > STALE_SECONDS for rank in self._ranks.values()):
            raise NotKnown(f"a replica has not reported for {STALE_SECONDS:.0f} seconds")

    def tell(self, text: Floats) -> Floats:
        """``[D]`` signature that a request with this text is likely to have.

        Raises:
            NotKnown: no request so far had such a text.
        """
        if self._kinds is None:
            reports = [rank.report for rank in self._ranks.values()]
            self._kinds = Kinds.of_several([report.kinds for report in reports])
            if self._kinds.kinds:
                self._usual = self._kinds.usual
        found = self._kinds.tell(text)
        if found is None:
            raise NotKnown("no request with such a text so far")
        return found

    def order(self, wanted: Floats, loads: Mapping[str, float | None]) -> list[str]:
        """Names of the ranks, the one to take first; those of a gang the least loaded first.

        Args:
            wanted: ``[D]``, of :meth:`tell`.
            loads: by name, as Ray counts them; None = take what was reported and placed since.
        """
        loaded: dict[str, list[tuple[float, str]]] = {}
        liked: dict[str, Floats] = {}
        for name, rank in self._ranks.items():
            report, counted = rank.report, loads.get(name)
            load = rank.load if counted is None else counted
            loaded.setdefault(report.gang, []).append((load, name))
            liked[report.gang] = liked.get(report.gang, np.zeros_like(wanted)) + report.likes
        gangs = [
            Gang(gang, sum(load for load, _ in ranks) / len(ranks), liked[gang])
            for gang, ranks in loaded.items()
        ]
        order = ranked(gangs, wanted, self._usual)
        return [name for gang in order for _, name in sorted(loaded[gang.name])]

    def placed(self, name: str) -> None:
        """A request has gone to this rank."""
        rank = self._ranks.get(name)
        if rank is not None:
            rank.placed.append(self._clock())
