"""Importers for the two formats of the published code (github.com/JL-Cheng/SERE).

(a) ``similarity_matrices.pt``: a pickled ``{layer: tensor [E, E]}``, read with ``weights_only``.
(b) a calibrated checkpoint: ``model.layers.N.mlp.similarity_matrix`` among its safetensors.

Neither says which model it fits; that, and the router fingerprints, come from the checkpoint.
"""

import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sere_ray.artifact.gates import router_fingerprint
from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.calibration.collect import MoEShape, find_moe_layers, moe_shape
from sere_ray.calibration.loading import empty_model, load_config, model_name, resolved_revision
from sere_ray.util.errors import ArtifactError
from sere_ray.util.results import CALIBRATION_LIBRARIES, library_versions

# bf16 matrices of the published code round a similarity of nearly 1 to at most this
_ROUNDED_ONE = 1.01
_LAYER_KEY = re.compile(r"(?:model\.layers\.|layers\.)?(\d+)(?:\.mlp)?(?:\.similarity_matrix)?")
_MATRIX_NAME = re.compile(r"model\.layers\.(\d+)\.mlp\.similarity_matrix")
_GATE_NAME = re.compile(r"(?:model\.)?layers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight")


def import_matrices(
    path: Path | str, model: str, metric: str | None = None, *, revision: str | None = None
) -> SimilarityArtifact:
    """Convert published similarity matrices.

    Args:
        path: a ``.pt`` file, or the folder of a calibrated checkpoint.
        model: local folder or hub name of the model they were calibrated on; the calibrated
            checkpoint itself will do. Gives architecture, E, K, layers and fingerprints.
        metric: which one was calibrated with, if known.
        revision: branch, tag or commit of a hub model.

    Returns:
        An artifact that has not been saved yet. Diagonals are 1, as the published loader sets
        them.

    Raises:
        ArtifactError: not such a file, or it does not fit the model.
        SereError: the model cannot be read or has no MoE layers.
    """
    path = Path(path).expanduser()
    matrices = _from_checkpoint(path) if path.is_dir() else _from_pickle(path)
    config = empty_model(load_config(model, revision))
    shape = moe_shape(config, find_moe_layers(config))
    _check_layers(matrices, shape, path, model)
    gates = _gate_weights(model, revision, shape.layers)
    metadata = ArtifactMetadata(
        model_id=model_name(model),
        revision=resolved_revision(model, revision),
        architecture=shape.architecture,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        router_fingerprint={layer: router_fingerprint(gate) for layer, gate in gates.items()},
        metric=metric or "unknown",
        tokens=0,
        libraries=library_versions(CALIBRATION_LIBRARIES),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        synthetic=False,
    )
    layers = {i: _clean(matrix, shape, f"{path}: layer {i}") for i, matrix in matrices.items()}
    return SimilarityArtifact(layers, metadata)


def _from_pickle(path: Path) -> dict[int, Tensor]:
    """Read format (a) without running any code it may hold."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; give similarity_matrices.pt or a checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ArtifactError(
            f"{path}: refused, it is not a file of plain tensors ({reason}); give the "
            "similarity_matrices.pt of the published code"
        ) from None
    if not isinstance(content, dict) or not content:
        raise ArtifactError(
            f"{path}: holds {type(content).__name__}, must be a mapping {{layer: tensor}}; give "
            "the similarity_matrices.pt of the published code"
        )
    matrices: dict[int, Tensor] = {}
    for key, value in content.items():
        match = _LAYER_KEY.fullmatch(str(key))
        if match is None or not isinstance(value, Tensor):
            raise ArtifactError(
                f"{path}: entry {key!r} holds {type(value).__name__}; allowed: tensors under a "
                "layer number or model.layers.<i>.mlp.similarity_matrix"
            )
        _put(matrices, int(match[1]), value, path)
    return matrices


def _from_checkpoint(folder: Path) -> dict[int, Tensor]:
    """Read format (b); no other tensor of the checkpoint is read."""
    matrices: dict[int, Tensor] = {}
    for layer, tensor in _tensors(folder, _MATRIX_NAME):
        _put(matrices, layer, tensor, folder)
    if not matrices:
        raise ArtifactError(
            f"{folder}: its safetensors files hold no model.layers.<i>.mlp.similarity_matrix; "
            "give a calibrated checkpoint of the published code or its similarity_matrices.pt"
        )
    return matrices


def _put(matrices: dict[int, Tensor], layer: int, matrix: Tensor, path: Path) -> None:
    if layer in matrices:
        raise ArtifactError(f"{path}: holds layer {layer} twice; remove one")
    matrices[layer] = matrix


def _tensors(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[int, Tensor]]:
    """Tensors of all shards whose name matches, with the layer in it."""
    for shard in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if match := pattern.fullmatch(name):
                        yield int(match[1]), file.get_tensor(name)
        except SafetensorError as error:
            raise ArtifactError(
                f"{shard}: damaged safetensors file ({error}); copy it again"
            ) from None


def _gate_weights(model: str, revision: str | None, layers: Iterable[int]) -> dict[int, Tensor]:
    """Gate weights ``[E, H]`` of the given layers, from the model's shards."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        # the shards are what will be served, so they are in the cache or wanted there anyway
        patterns = ["*.safetensors", "*.json"]
        try:
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(
                f"model = {model!r}: cannot read its router weights ({reason}); give a local "
                "checkpoint folder"
            ) from None
    found = dict(_tensors(folder, _GATE_NAME))
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise ArtifactError(
            f"model = {model!r}: no gate weight for MoE layers {missing} in {folder}/*.safetensors"
            "; give the folder of the whole checkpoint"
        )
    return {layer: found[layer] for layer in layers}


def _check_layers(matrices: Mapping[int, Tensor], shape: MoEShape, path: Path, model: str) -> None:
    if sorted(matrices) != list(shape.layers):
        raise ArtifactError(
            f"{path}: has matrices for layers {sorted(matrices)}, but the MoE layers of "
            f"{model!r} are {list(shape.layers)}; give the model they were calibrated on"
        )


def _clean(matrix: Tensor, shape: MoEShape, where: str) -> Tensor:
    """``[E, E]`` float32 on the CPU, at most 1, diagonal 1."""
    size = shape.num_experts
    if tuple(matrix.shape) != (size, size) or not matrix.is_floating_point():
        raise ArtifactError(
            f"{where} is {matrix.dtype} {tuple(matrix.shape)}, must be float {(size, size)} for "
            f"this model; give the model the matrices were calibrated on"
        )
    values = matrix.detach().to("cpu", torch.float32, copy=True)
    if not bool(torch.isfinite(values).all()):
        raise ArtifactError(f"{where} holds NaN or infinite values; calibrate again")
    if bool((values > _ROUNDED_ONE).any()):
        raise ArtifactError(
            f"{where} holds {values.max():.3g}, but a similarity is at most 1; not a matrix of "
            "the published code"
        )
    return values.clamp_(max=1.0).fill_diagonal_(1.0)
