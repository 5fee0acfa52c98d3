"""Artifact files as the policy actor reads them, without torch, and replicas keep them."""

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.masks.artifact import MasksArtifact
from sere_ray.util.errors import ArtifactError
from sere_ray.util.files import atomic_path


@dataclass(frozen=True)
class ArtifactFile:
    """The content of an artifact's file, or of one of masks."""

    name: str
    """Path of the file, as the policy's key ``similarity`` or ``masks`` gives it."""
    sha256: str
    content: bytes

    def parse(self) -> SimilarityArtifact:
        """The matrices, as numpy's, and metadata in the file.

        Raises:
            ArtifactError: the content is damaged or no artifact.
        """
        return SimilarityArtifact.from_bytes(self.content, name=self.name, framework="np")

    def parse_masks(self) -> MasksArtifact:
        """The levels of masks in the file.

        Raises:
            ArtifactError: the content is damaged or holds no masks.
        """
        return MasksArtifact.from_bytes(self.content, name=self.name, framework="np")

    def describe(self, masks: MasksArtifact | None) -> dict[str, Any]:
        """Fields of ``MasksInfo`` in the control API."""
        levels = [] if masks is None else masks.metadata.levels
        return {
            "name": self.name,
            "sha256": self.sha256,
            "bytes": len(self.content),
            "levels": [level.model_dump() for level in levels],
        }


def path_in(folder: Path | None, name: str) -> Path:
    """The path of an artifact in the configured folder.

    Raises:
        ArtifactError: there is no folder, or the name is not that of a file in it.
    """
    if folder is None:
        raise ArtifactError(
            f"artifact = {name!r}: this deployment names no folder; set `artifacts` in its file"
        )
    path = folder / name
    is_plain = name and Path(name).name == name and not name.startswith(".") and "\0" not in name
    if not is_plain or path.is_symlink():
        raise ArtifactError(
            f"artifact = {name!r}: must be the name of a file in the configured folder"
        )
    if path.suffix != ".safetensors":
        raise ArtifactError(f"artifact = {name!r}: must end in .safetensors")
    return path


def read_artifact(path: Path, max_bytes: int) -> ArtifactFile:
    """Read a regular file of at most ``max_bytes``.

    Raises:
        ArtifactError: missing, unreadable, no regular file or too large.
    """
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(path.stat().st_mode):
                raise ArtifactError(f"{path}: not a regular file")
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ArtifactError(
            f"{path}: {error.strerror}, on the node of the policy actor; `sere-ray calibrate` "
            "makes an artifact, `sere-ray train-masks` masks"
        ) from None
    if len(content) > max_bytes:
        raise ArtifactError(
            f"{path}: larger than max_artifact_bytes = {max_bytes}; raise it in the deployment file"
        )
    return ArtifactFile(str(path), hashlib.sha256(content).hexdigest(), content)


def keep_artifact(folder: Path, sha256: str, content: bytes) -> Path:
    """Write content under its hash, where an engine that starts reads it."""
    path = folder / f"{sha256}.safetensors"
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path
