"""A folder for temporary files whose path leaves room for the names of sockets."""

import os
import tempfile
from pathlib import Path

from sere_ray.util.errors import SereError

SOCKET_PATH = 107
"""The most bytes that Linux takes as the path of a socket."""
OF_RAY = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""What Ray puts behind the folder for temporary files."""
_OTHERS = ("/tmp", "/dev/shm")
_VARIABLES = ("RAY_TMPDIR", "TMPDIR")


def short_folder(room: int) -> Path:
    """The folder for temporary files, or another one if its path is too long.

    Args:
        room: bytes that the path of a socket in it needs beside its own.

    Raises:
        SereError: no such folder can be written to; names the variable and its value.
    """
    given = [os.environ[name] for name in _VARIABLES if os.environ.get(name)]
    for folder in map(Path, [*given, *_OTHERS]):
        if len(os.fsencode(folder)) + room <= SOCKET_PATH and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise SereError(
        f"TMPDIR = {tempfile.gettempdir()!r}: sockets below it need a path of at most "
        f"{SOCKET_PATH - room} bytes, and neither {' nor '.join(_OTHERS)} can be written to; set "
        "TMPDIR to a short path"
    )


def leave_room_for_sockets() -> None:
    """Use a folder with a shorter path, here and in children, where Ray's sockets have no room.

    Raises:
        SereError: there is none.
    """
    folder = str(short_folder(OF_RAY))
    for name in _VARIABLES:
        if len(os.fsencode(os.environ.get(name, ""))) + OF_RAY > SOCKET_PATH:
            os.environ[name] = folder
            tempfile.tempdir = None  # it is found anew
