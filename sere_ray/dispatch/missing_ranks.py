"""Find out which rank is gone: the others say so, within a bounded time.

When a process dies, gloo fails at its peers with an address at most, and where a process hangs,
after the timeout of the group, with nothing. So the ranks that are left greet each other over a
second group, whose connections the failed exchange did not touch, and name whoever is silent.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

_SLACK = timedelta(seconds=2)
"""Ranks that time out together do so at slightly different times."""


class MissingRankError(RuntimeError):
    """A rank of the expert-parallel group is dead or hangs; the engine cannot go on without it."""


class Greeting(NamedTuple):
    """How ranks find out who is left."""

    group: dist.ProcessGroup
    """A gloo group of the same ranks as the exchanges', used for nothing else at the time."""
    timeout: timedelta
    """How long to wait for an answer: as long as an exchange, since some ranks notice only when
    their own exchange times out."""


@contextmanager
def naming_missing_ranks(group: dist.ProcessGroup, greeting: Greeting | None) -> Iterator[None]:
    """Run exchanges of ``group``; turn their failure into an error that names missing ranks.

    A dead process on a reachable host is noticed at once, a hanging one after the timeout of
    ``group``; the greeting takes at most ``greeting.timeout`` and two seconds more. That is gloo.
    With NCCL, torch's watchdog ends the process after the timeout of ``group``, and names no rank.

    Args:
        group: what the exchanges inside use.
        greeting: None leaves errors as they are.

    Raises:
        MissingRankError: an exchange failed; names the ranks that did not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if greeting is None or isinstance(error, MissingRankError) or not _broke(error):
            raise
        missing = silent_ranks(greeting.group, greeting.timeout + _SLACK)
        names = ", ".join(map(str, missing)) or "none (only a connection broke)"
        raise MissingRankError(
            f"sere: an exchange of expert-parallel rank {group.rank()} with the other "
            f"{group.size() - 1} failed; missing: {names}. Restart all ranks together; look for "
            f"the cause at a missing one. First error here: {str(error).splitlines()[0]}"
        ) from error


def _broke(error: RuntimeError) -> bool:
    """Whether an exchange was cut off, and was not called with wrong arguments."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def silent_ranks(group: dist.ProcessGroup, timeout: timedelta) -> list[int]:
    """Ranks that do not answer a greeting; all that live must call this.

    Args:
        group: a gloo group, all of whose ranks were connected.
        timeout: how long to wait for an answer.
    """
    silent, waiting = set(), []
    for rank in (rank for rank in range(group.size()) if rank != group.rank()):
        greeting, answer = torch.ones(1, device="cpu"), torch.zeros(1, device="cpu")
        try:
            received = group.recv([answer], rank, 0)
            waiting.append((rank, received, group.send([greeting], rank, 0), greeting, answer))
        except RuntimeError:  # its connection is closed
            silent.add(rank)
    for rank, received, *_kept_alive in waiting:
        try:
            received.wait(timeout)
        except RuntimeError:
            silent.add(rank)
    return sorted(silent)
