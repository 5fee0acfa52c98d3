"""Engine processes forked from one that has imported vLLM: a start and a restart take seconds less.

vLLM starts the process of an engine, and the coordinator of its ranks, as new Pythons: each imports
vLLM anew. Here they are forked by the node's
:mod:`fork server <sere_ray.engine.fork_server>`. A process that cannot be forked is started as vLLM
would have. On GPUs nothing is forked, as no GPU has run it.

==========================  =====================================================================
patch                       what, why, remove when
==========================  =====================================================================
get_mp_context              ``vllm.v1.engine.utils`` and ``.coordinator`` take their processes from
                            it; in a Ray actor it always spawns. Remove: vLLM lets a caller choose.
Popen                       of the standard library: a handle of its own fork server's processes.
                            Remove: as ``ForkServer``.
==========================  =====================================================================
"""

import io
import logging
import os
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import (
    connection,
    context,
    forkserver,
    parent_process,
    popen_forkserver,
    popen_spawn_posix,
    reduction,
    spawn,
    util,
)
from typing import Any, ClassVar

from sere_ray.engine.fork_server import SharedForkServer

logger = logging.getLogger(__name__)
FORK_SECONDS = 120.0
"""How long a fork is waited for: the first one waits for the imports."""
FAREWELL_SECONDS = 5.0
"""How long a forked process lives on after the one that asked for it."""


class _AsHere:
    """A process to be forked, pickled with what a spawned one would inherit."""

    def __init__(self, process: Any) -> None:
        self.process = process

    def __reduce__(self) -> tuple[Any, ...]:
        data = io.BytesIO()
        reduction.dump(self.process, data)
        out, err = (reduction.DupFd(number) for number in (1, 2))
        return _as_there, (dict(os.environ), out, err, data.getvalue())


def _as_there(environment: dict[str, str], out: Any, err: Any, data: bytes) -> Any:
    """In the forked process: be as the one that asked for it, and end with it."""
    os.environ.clear()
    os.environ.update(environment)
    for source, number in ((out, 1), (err, 2)):
        os.dup2(source.detach(), number)
    return pickle.loads(data)


class ForkedProcess(context.SpawnProcess):
    """A process of the fork server; where that fails, one that is started as usual."""

    server: ClassVar[SharedForkServer | None] = None
    """That of this process, once :func:`prepare` was called."""

    @staticmethod
    def _Popen(process: Any) -> Any:
        if ForkedProcess.server is not None:
            try:
                return _Forked(process, ForkedProcess.server)
            except (OSError, EOFError) as error:
                logger.warning("%s is not forked but started: %r", process.name, error)
        return popen_spawn_posix.Popen(process)

    def run(self) -> None:
        """Run the target, and end with the process that asked for it, even if the target hangs."""
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        time.sleep(FAREWELL_SECONDS)
        os._exit(1)


class _Forked(popen_forkserver.Popen):
    """Handle of a forked process, as the standard library's, of a shared server."""

    _fds: list[int]

    def __init__(self, process: Any, server: SharedForkServer) -> None:
        self._server = server
        super().__init__(process)

    def _launch(self, process: Any) -> None:
        data = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process.name), data)
            reduction.dump(_AsHere(process), data)
        finally:
            context.set_spawning_popen(None)
        self.sentinel, writer = self._server.connect_to_new_process(self._fds)
        # The child ends with the last that holds this end: see ForkedProcess.run.
        held: Any = (os.dup(writer), self.sentinel)
        self.finalizer = util.Finalize(self, _close, held)
        with open(writer, "wb") as file:
            if not connection.wait([self.sentinel], FORK_SECONDS):
                raise TimeoutError(f"no fork within {FORK_SECONDS:.0f} s")
            self.pid = forkserver.read_signed(self.sentinel)
            file.write(data.getbuffer())


def _close(*numbers: int) -> None:
    for number in numbers:
        os.close(number)


class ForkContext(context.SpawnContext):
    """A context of :mod:`multiprocessing` whose processes are forked by the node's server."""

    Process = ForkedProcess


def prepare(lives_with: int) -> None:
    """Have the node's fork server start, if it does not run yet; does not wait for it.

    Args:
        lives_with: id of the process with which it ends.
    """
    if ForkedProcess.server is None:
        try:
            ForkedProcess.server = SharedForkServer(lives_with)
        except OSError as error:
            logger.warning("no fork server: %s", error)


@contextmanager
def forked_engines() -> Iterator[None]:
    """Take the processes that vLLM starts in the block from the fork server, on CPUs."""
    from vllm.platforms import current_platform
    from vllm.v1.engine import coordinator, utils

    if not current_platform.is_cpu():
        yield
        return
    stock = utils.get_mp_context

    def fork_context() -> ForkContext:
        stock()  # it sets the environment of what it starts
        return ForkContext()

    places: tuple[Any, ...] = (utils, coordinator)
    for place in places:
        place.get_mp_context = fork_context
    try:
        yield
    finally:
        for place in places:
            place.get_mp_context = stock
