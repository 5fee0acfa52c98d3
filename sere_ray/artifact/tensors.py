"""The tensors of an artifact's file: how they are named, and what they may hold."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sere_ray.artifact.statistics import ALL_NAMES, check_statistics
from sere_ray.util.errors import ArtifactError

SIMILARITY = "similarity"


def tensor_name(layer: int, name: str = SIMILARITY) -> str:
    """How the file names a tensor of a layer."""
    return f"layers.{layer}.{name}"


def layer_and_name(full: str, path: Path) -> tuple[int, str]:
    """Layer and name of a tensor of the file.

    Raises:
        ArtifactError: no artifact has such a tensor.
    """
    parts = full.split(".")
    known = len(parts) == 3 and parts[1].isdigit() and parts[2] in (SIMILARITY, *ALL_NAMES)
    if not known or full != tensor_name(int(parts[1]), parts[2]):
        raise ArtifactError(
            f"{path}: unexpected tensor {full!r}; allowed: layers.<i>.similarity, and "
            f"{', '.join(ALL_NAMES)} in its place"
        )
    return int(parts[1]), parts[2]


def check_content(
    layers: Mapping[int, Tensor],
    statistics: Mapping[int, Mapping[str, Tensor]],
    num_experts: int,
    path: Path,
) -> None:
    """Refuse tensors that are not what an artifact holds.

    Args:
        layers: similarity by decoder layer.
        statistics: further tensors by decoder layer and name.
        num_experts: E.
        path: of the file, for messages.

    Raises:
        ArtifactError: names the layer and what is wrong.
    """
    size = num_experts
    if not layers:
        raise ArtifactError(f"{path}: holds no layer; calibrate again")
    for layer, matrix in sorted(layers.items()):
        where = f"{path}: layer {layer}"
        if matrix.dtype != torch.float32 or tuple(matrix.shape) != (size, size):
            raise ArtifactError(
                f"{where} is {matrix.dtype} {tuple(matrix.shape)}, must be torch.float32 "
                f"{(size, size)} (num_experts = {size}); calibrate again"
            )
        if not bool(torch.isfinite(matrix).all()):
            raise ArtifactError(f"{where} holds NaN or infinite values; calibrate again")
        if bool((matrix.diagonal() < matrix.max(dim=1).values).any()):
            raise ArtifactError(
                f"{where}: an expert is less similar to itself (diagonal) than to another one; "
                "calibrate again"
            )
    for layer, named in sorted(statistics.items()):
        if layer not in layers:
            raise ArtifactError(f"{path}: statistics of layer {layer}, which has no similarity")
        check_statistics(named, size, f"{path}: layer {layer}")
