"""The processes of a deployment on this machine, by what Ray and vLLM call them."""

from collections.abc import Iterator
from contextlib import suppress

import psutil

ENGINE = "VLLM::EngineCore"
FORK_SERVER = "sere_ray.engine.fork_server"
"""Program whose first arguments are a socket and the id of the process with which it ends."""


def family(root: psutil.Process) -> list[psutil.Process]:
    """A process, its descendants, and what the fork servers that live with them have forked.

    Raises:
        psutil.NoSuchProcess: the root has ended.
    """
    found = [root, *root.children(recursive=True)]
    ids = {process.pid for process in found}
    for process in psutil.process_iter():
        with suppress(psutil.Error, ValueError, IndexError):
            # Who sets a title leaves one string, with spaces, in place of the arguments.
            words = " ".join(process.cmdline()).split()
            lives_with = int(words[words.index(FORK_SERVER) + 2])
            if lives_with in ids - {process.pid}:
                forked = [process, *process.children(recursive=True)]
                found += [each for each in forked if each.pid not in ids]
    return found


def processes(root: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
    """The family of a process, each with its title: what Ray or vLLM set, or its program.

    Processes that end meanwhile are left out.

    Raises:
        psutil.NoSuchProcess: the root has ended.
    """
    for process in family(root):
        with suppress(psutil.Error):
            yield (process.cmdline() or [process.name()])[0], process


def processes_named(root: psutil.Process, start: str) -> list[psutil.Process]:
    """The family of a process, as far as titles begin with ``start``."""
    return [process for title, process in processes(root) if title.startswith(start)]
