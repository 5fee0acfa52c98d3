"""What the processes of a deployment on this machine hold, and which of them is an engine."""

from collections import Counter
from contextlib import suppress

import psutil

from sere_ray.util.errors import SereError
from sere_ray.util.processes import ENGINE, processes, processes_named


def usage(pid: int) -> tuple[dict[str, float], int]:
    """Memory in MiB by kind of process, and open files of all of them.

    A page that processes share counts once: each has its share of it (PSS).

    Args:
        pid: of a `sere-ray serve`; its children are counted, too.

    Raises:
        SereError: there is no such process.
    """
    memory: Counter[str] = Counter()
    files = 0
    for title, process in processes(_root(pid)):
        with suppress(psutil.Error):  # it has just ended
            memory[_kind(title)] += process.memory_full_info().pss
            files += process.num_fds()
    return {kind: size / 2**20 for kind, size in memory.items()}, files


def first_engine(pid: int) -> psutil.Process:
    """An engine below a process.

    Raises:
        SereError: there is none, or no such process.
    """
    engines = processes_named(_root(pid), ENGINE)
    if not engines:
        raise SereError(f"--pid {pid}: no engine process below it to kill; see --no-kill-rank")
    return engines[0]


def _root(pid: int) -> psutil.Process:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        raise SereError(f"--pid {pid}: no such process; give that of `sere-ray serve`") from None


def _kind(title: str) -> str:
    """What Ray and vLLM call a process, without the method it runs; otherwise its program."""
    _, separator, name = title.partition("::")
    return name.split(".")[0] if separator else title.split("/")[-1]
