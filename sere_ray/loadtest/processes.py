"""The processes of a deployment on this machine: what they hold, and how one is killed."""

import os
import signal
from collections import Counter
from collections.abc import Iterator

import psutil

from sere_ray.errors import SereError

_ENGINE = "VLLM::EngineCore"


def usage(pid: int) -> tuple[dict[str, float], int]:
    """Memory in MiB by kind of process, and open files of all of them.

    A page that processes share counts once: each has its share of it (PSS).

    Args:
        pid: of a `sere-ray serve`; its children are counted, too.
    """
    memory: Counter[str] = Counter()
    files = 0
    for process in _processes(pid):
        try:
            memory[_kind(_title(process))] += process.memory_full_info().pss
            files += process.num_fds()
        except psutil.Error:
            continue  # it has just ended
    return {kind: size / 2**20 for kind, size in memory.items()}, files


def kill_engine(pid: int) -> None:
    """Kill the first engine below a process, with SIGKILL.

    Raises:
        SereError: there is none.
    """
    for process in _processes(pid):
        try:
            if _title(process).startswith(_ENGINE):
                os.kill(process.pid, signal.SIGKILL)
                return
        except psutil.Error:
            continue
    raise SereError(f"--pid {pid}: no engine process below it to kill")


def _processes(pid: int) -> Iterator[psutil.Process]:
    root = psutil.Process(pid)
    yield root
    yield from root.children(recursive=True)


def _title(process: psutil.Process) -> str:
    words: list[str] = process.cmdline() or [process.name()]
    return words[0]


def _kind(title: str) -> str:
    """What Ray and vLLM call a process, without the method it runs; otherwise its program."""
    _, separator, name = title.partition("::")
    return name.split(".")[0] if separator else title.split("/")[-1]
