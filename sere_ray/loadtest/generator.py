"""The generator's processes: this one controls, the others send."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from sere_ray.loadtest.client import now
from sere_ray.loadtest.driver import Load, LoadPlan, run_part

if TYPE_CHECKING:
    from multiprocessing.pool import AsyncResult, Pool

_PRIORITY = -10
"""Nice value of the processes that send, where the system allows it. Beside an engine on the same
cores they have little to do, but must do it at once."""
_LEAD_SECONDS = 0.2
"""How long before a load starts its parts are handed out."""


class Generator:
    """Sends loads; made by :func:`generator`."""

    def __init__(self, pool: "Pool", processes: int) -> None:
        self._pool, self._processes = pool, processes

    def run(self, plan: LoadPlan) -> Load:
        """Send a load and return when it has ended."""
        return self.begin(plan).result()

    def begin(self, plan: LoadPlan) -> "Pending":
        """Send a load in the background."""
        parts = plan.split(self._processes)
        start = now() + _LEAD_SECONDS
        return Pending(self._pool.starmap_async(run_part, [(p, start) for p in parts], chunksize=1))


class Pending:
    """A load that is being sent; it ends with its generator."""

    def __init__(self, parts: "AsyncResult[list[Load]]") -> None:
        self._parts = parts

    def done(self) -> bool:
        """Whether it has ended."""
        return self._parts.ready()

    def result(self) -> Load:
        """Wait for the end."""
        first, *others = self._parts.get()
        for other in others:
            first.merge(other)
        return first


@contextmanager
def generator(processes: int = 1) -> Iterator[Generator]:
    """Start processes that send, and end them, whatever happens."""
    context = multiprocessing.get_context("spawn")  # gevent and fork do not mix with threads
    with context.Pool(processes, initializer=_prepare) as pool:
        pool.starmap(divmod, [(1, 1)] * processes, chunksize=1)  # all have started
        yield Generator(pool, processes)


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
