"""Requests that find no engine wait for one that restarts, bounded in number and in time."""

import asyncio
from collections.abc import Callable

from sere_ray.proxy.limits import Limits

CHECK_SECONDS = 0.1


class WaitingRoom:
    """Where requests of one process wait.

    Args:
        limits: of the deployment file: ``queue_while_restarting_s`` and ``max_queued``.
    """

    def __init__(self, limits: Limits) -> None:
        self._seconds, self._places = limits.queue_while_restarting_s, limits.max_queued
        self._waiting = 0

    def deadline(self) -> float:
        """Until when a request may wait that comes now, in seconds of the event loop's clock."""
        return asyncio.get_running_loop().time() + self._seconds

    async def hold(self, deadline: float, is_over: Callable[[], bool]) -> bool:
        """Hold a request until its wait is over.

        Args:
            deadline: of :meth:`deadline`.
            is_over: whether it can go on.

        Returns:
            Whether it can: False = there was no place for it, or not enough time.
        """
        if self._waiting >= self._places:
            return False
        loop = asyncio.get_running_loop()
        self._waiting += 1
        try:
            while not is_over() and loop.time() < deadline:
                await asyncio.sleep(CHECK_SECONDS)
            return is_over()
        finally:
            self._waiting -= 1
