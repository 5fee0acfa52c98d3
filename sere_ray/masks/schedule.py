"""Who trains on what: a level's windows in units, each of which is trained on exactly once.

A unit is a worker's share of a step's windows. Unit u is share u mod N of step u div N, with N
workers. At every meeting the units that are left are dealt out in turn; a worker takes as many of
its own as it gets to, and what it leaves is dealt out again.
"""

from dataclasses import dataclass, field


@dataclass
class Units:
    """Which units of a level are done.

    Attributes:
        steps: of the level.
        workers: N.
        whole: steps that are done as a whole, from the first one on.
        ahead: further units that are done, growing; none unless workers differ in speed.
    """

    steps: int
    workers: int
    whole: int = 0
    ahead: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Of the level."""
        return self.steps * self.workers

    @property
    def done(self) -> int:
        """How many are done."""
        return self.whole * self.workers + len(self.ahead)

    def of_worker(self, rank: int) -> list[int]:
        """Units that a worker may take until the next meeting, in order."""
        return self._left()[rank :: self.workers]

    def take(self, counts: list[int]) -> None:
        """Each worker has done so many of :meth:`of_worker`, from the first one on."""
        left = self._left()
        taken = [left[rank :: self.workers][:count] for rank, count in enumerate(counts)]
        done = set(self.ahead).union(*taken)
        while done and set(range(first := self.whole * self.workers, first + self.workers)) <= done:
            done -= set(range(first, first + self.workers))
            self.whole += 1
        self.ahead = sorted(done)

    def _left(self) -> list[int]:
        ahead = set(self.ahead)
        return [u for u in range(self.whole * self.workers, self.total) if u not in ahead]
