"""The tensors of an artifact's file: how they are named, and what they may hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetensors import SafetensorError, safe_open

from sere_ray.artifact.statistics import ALL_NAMES, check_statistics, is_finite, is_float32
from sere_ray.util.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

SIMILARITY = "similarity"
Framework = Literal["pt", "np"]
"""As safetensors calls it: whose tensors a file is read as, torch's or numpy's."""


def read_file(path: Path, framework: Framework) -> "tuple[dict[str, str], dict[str, Tensor]]":
    """Metadata and tensors of a safetensors file.

    Raises:
        ArtifactError: damaged, or a tensor is of a type that numpy has not, where it is asked for.
    """
    try:
        with safe_open(path, framework=framework) as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            return file.metadata() or {}, tensors
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged safetensors file ({error}); copy it again") from None
    except (TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: holds other numbers than float32 ({error})") from None


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
    layers: "Mapping[int, Tensor]",
    statistics: "Mapping[int, Mapping[str, Tensor]]",
    num_experts: int,
    path: Path,
) -> None:
    """Refuse tensors that are not what an artifact holds.

    Args:
        layers: similarity by decoder layer; these, and the next, may be arrays of numpy's.
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
        if not is_float32(matrix) or tuple(matrix.shape) != (size, size):
            raise ArtifactError(
                f"{where} is {matrix.dtype} {tuple(matrix.shape)}, must be torch.float32 "
                f"{(size, size)} (num_experts = {size}); calibrate again"
            )
        if not is_finite(matrix):
            raise ArtifactError(f"{where} holds NaN or infinite values; calibrate again")
        if bool((matrix.diagonal()[:, None] < matrix).any()):
            raise ArtifactError(
                f"{where}: an expert is less similar to itself (diagonal) than to another one; "
                "calibrate again"
            )
    for layer, named in sorted(statistics.items()):
        if layer not in layers:
            raise ArtifactError(f"{path}: statistics of layer {layer}, which has no similarity")
        check_statistics(named, size, f"{path}: layer {layer}")
