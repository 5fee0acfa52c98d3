"""The processes of a deployment on this machine, by what Ray and vLLM call them."""

from collections.abc import Iterator
from contextlib import suppress

import psutil

ENGINE = "VLLM::EngineCore"


def processes(root: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
    """A process and all its descendants, each with its title: what Ray or vLLM set, or its program.

    Processes that end meanwhile are left out.

    Raises:
        psutil.NoSuchProcess: the root has ended.
    """
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.Error):
            yield (process.cmdline() or [process.name()])[0], process


def processes_named(root: psutil.Process, start: str) -> list[psutil.Process]:
    """A process and its descendants, as far as their title begins with ``start``."""
    return [process for title, process in processes(root) if title.startswith(start)]
