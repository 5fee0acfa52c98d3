"""Files as a whole: their hash, and a way to write them that leaves nothing half-written."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from sere_ray.util.errors import ArtifactError

Content = TypeVar("Content")


def file_sha256(path: Path | str) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it if the block ends well.

    Raises:
        ArtifactError: the folder is missing or cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror})") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_content(content: bytes, name: str, read: Callable[[Path], Content]) -> Content:
    """What a reader of artifact files makes of content that came over the network.

    Args:
        content: of the file.
        name: of the file, for messages.
        read: takes the path of a file.

    Raises:
        ArtifactError: that of the reader, with the name in it.
    """
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(content)
        file.flush()
        try:
            return read(Path(file.name))
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(file.name, name)) from None
