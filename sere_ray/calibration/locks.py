"""Two calibrations must not write one file: the second is refused at its start."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sere_ray.util.errors import ArtifactError


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Hold ``.NAME.lock`` beside ``out`` while the block runs; the system lets go of a dead holder.

    Raises:
        ArtifactError: another process holds it.
    """
    path = out.with_name(f".{out.name}.lock")
    with open(path, "a+", encoding="utf-8") as file:
        if not _take(file, path):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ArtifactError(
                f"out = {str(out)!r}: {holder} is writing this file; wait for it or give another "
                "file name"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _take(file: IO[str], path: Path) -> bool:
    """Lock the open file, unless another one holds it or has just finished and removed it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
