"""The fork server of a node: a process that has imported vLLM and forks those of engines.

It is the standard library's :mod:`multiprocessing.forkserver`, shared by all replicas of one
environment; :mod:`sere_ray.engine.forked` takes processes from it. It lives as long as Ray on the
node, so it outlives a gang.

==========================  =====================================================================
patch                       what, why, remove when
==========================  =====================================================================
ForkServer                  of the standard library: it belongs to the process that started it.
                            Remove: several processes can share one.
==========================  =====================================================================
"""

import fcntl
import hashlib
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import psutil

PRELOAD = ("ray", "vllm.v1.engine.core", "vllm.v1.engine.coordinator", "vllm.v1.worker.cpu_worker")
"""What engines import before they know their model."""
OWN = ("RAY_", "VLLM_RAY_", "VLLM_DP_")
"""Beginnings of variables that differ between replicas and that no import reads. Replicas that
differ in any other variable have fork servers of their own."""


class SharedForkServer(forkserver.ForkServer):
    """The fork server of a node, as one of the processes that use it sees it.

    Args:
        lives_with: id of the process with which it ends.
        preload: modules that it imports; they start no thread.
        folder: of its socket; None = one in the temporary folder that only this user can enter.

    Raises:
        OSError: it cannot be started, or others can enter the folder.
    """

    def __init__(
        self, lives_with: int, preload: Sequence[str] = PRELOAD, folder: Path | None = None
    ) -> None:
        super().__init__()
        folder = folder or Path(tempfile.gettempdir(), f"sere-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_private(folder)
        kept = sorted(item for item in os.environ.items() if not item[0].startswith(OWN))
        word = repr((lives_with, sys.executable, sys.path, preload, kept)).encode()
        path = folder / f"fork-{hashlib.sha256(word).hexdigest()[:16]}"
        with path.with_suffix(".lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            if not _is_running(lock.read()):
                lock.truncate(0)
                lock.write(_start(path, lives_with, preload))
        self._forkserver_address = str(path)
        # What ends with the last process that holds it; this fork server ends otherwise.
        self._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)

    def ensure_running(self) -> None:
        """Do nothing: what does not answer is noticed when a process is asked for."""
        resource_tracker.ensure_running()


def _check_private(folder: Path) -> None:
    """Who can connect can run code as this user.

    Raises:
        PermissionError: the folder is another user's, a link, or open to others.
    """
    status = folder.lstat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_own or stat.S_IMODE(status.st_mode) & 0o077:
        raise PermissionError(f"{folder}: others can enter it")


def _is_running(mark: str) -> bool:
    """Whether the process of this mark runs. (Who asked its socket instead would end it: it does
    not expect a connection that asks for nothing.)"""
    with suppress(ValueError, psutil.NoSuchProcess):
        process = psutil.Process(int(mark.split()[0]) if mark else -1)
        return mark == _mark(process) and process.status() != psutil.STATUS_ZOMBIE
    return False


def _mark(process: psutil.Process) -> str:
    return f"{process.pid} {process.create_time()}"


def _start(path: Path, lives_with: int, preload: Sequence[str]) -> str:
    """Start the server; who asks before its imports are done waits in the socket's queue.

    Returns:
        Its mark.
    """
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        number = listener.fileno()
        arguments = [str(number), str(lives_with), str(path), *preload]
        process = subprocess.Popen(
            [sys.executable, "-m", "sere_ray.engine.fork_server", *arguments],
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # signals and the end of a replica are not for it
        )
    return _mark(psutil.Process(process.pid))


def wait_until_unused(lives_with: int, check_s: float = 30.0, idle_s: float = 900.0) -> None:
    """Wait until a process ends, or this one had no child for a while.

    Replicas of another environment have another fork server, so one whose deployment is gone would
    stay as long as Ray runs.

    Args:
        lives_with: process id.
        check_s: seconds between two looks.
        idle_s: how long it may have no child.
    """
    used = time.monotonic()
    while time.monotonic() - used < idle_s:
        try:
            psutil.Process(lives_with).wait(check_s)
        except psutil.TimeoutExpired:
            if psutil.Process().children():
                used = time.monotonic()
        except psutil.NoSuchProcess:
            return
        else:
            return


def main(listener: int, lives_with: int, path: str, preload: Sequence[str]) -> None:
    """Be the fork server, until the process ``lives_with`` ends, or nobody uses it any more.

    Args:
        listener: number of the socket, which listens already.
        lives_with: process id.
        path: of the socket; it and its lock are removed at the end.
        preload: modules to import first.
    """

    def end() -> None:
        wait_until_unused(lives_with)
        for each in (Path(path), Path(path).with_suffix(".lock")):
            each.unlink(missing_ok=True)
        os._exit(0)

    import setproctitle  # vLLM brings it

    setproctitle.getproctitle()  # it looks for its place before an environment is changed
    threading.Thread(target=end, daemon=True).start()
    never_ends, _ = os.pipe()
    forkserver.main(listener, never_ends, list(preload))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
