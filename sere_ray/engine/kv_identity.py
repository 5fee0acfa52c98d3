"""What KV blocks are of, as a word that engines of the same model and policy agree on.

Two engines may hand each other blocks, through a cache beside the GPU, only if both compute the
same. What counts: every number of the policy, the matrices and masks (not the files' paths), the
weights, and in which type they are served. Under the modes ``off`` and ``observe`` an engine
computes what stock does, so there is no word: blocks are those of stock.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.masks.artifact import MasksArtifact
from sere_ray.policy.bound import BoundPolicy

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def kv_word(policy: BoundPolicy, matrices: str, weights: str, masks: str = "") -> str | None:
    """The word of what re-routed rows leave in the KV cache.

    Args:
        policy: the numbers that run.
        matrices: of :func:`matrices_digest`.
        weights: of :func:`weights_digest`.
        masks: of :func:`masks_digest`; counts where a level of theirs runs.

    Returns:
        32 hexadecimal digits; None = the policy changes nothing.
    """
    if policy.mode != "on" or (policy.rule == "none" and not policy.level):
        return None
    parts = ("2", policy.model_dump_json(), matrices, weights, masks if policy.level else "")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def masks_digest(masks: MasksArtifact | None) -> str:
    """A hash of all levels and of what else decides which slots are masked."""
    if masks is None:
        return ""
    digest = hashlib.sha256(f"keep_first {masks.metadata.keep_first}".encode())
    for level, of_level in sorted(masks.weights.items()):
        for layer, weight in sorted(of_level.items()):
            digest.update(f"{level} {layer} {tuple(weight.shape)}".encode())
            digest.update(weight.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def matrices_digest(artifact: SimilarityArtifact | None) -> str:
    """A hash of all matrices and statistics, with their layers."""
    if artifact is None:
        return ""
    digest = hashlib.sha256()
    for layer, matrix in sorted(artifact.layers.items()):
        digest.update(f"{layer} {tuple(matrix.shape)}".encode())
        digest.update(matrix.contiguous().cpu().numpy().tobytes())
    for layer, named in sorted(artifact.statistics.items()):
        for name, tensor in sorted(named.items()):
            digest.update(f"{layer} {name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def weights_digest(model_config: Any, load_format: str) -> str | None:
    """A hash of the served checkpoint, of what vLLM makes of it, and of its revision.

    Of each file of weights: name, size and 64 samples of 64 KiB, spread over it evenly. Training
    changes nearly every value; an edit between the samples is not seen.

    Args:
        model_config: vLLM's.
        load_format: of its load configuration.

    Returns:
        None where no such files are on this machine, or weights are random: nothing is known.
    """
    folder = None if load_format == "dummy" else _checkpoint(model_config)
    files = [] if folder is None else sorted(f for p in _WEIGHTS for f in folder.glob(p))
    if folder is None or not files:
        return None
    served = (model_config.dtype, model_config.quantization, model_config.hf_config.architectures)
    digest = hashlib.sha256(repr(served).encode())
    for file in files:
        digest.update(_sampled(file))
    return digest.hexdigest()


def _checkpoint(model_config: Any) -> Path | None:
    """The folder of the weights: the one that was named, or that of the Hub's cache."""
    if Path(model_config.model).is_dir():
        return Path(model_config.model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            model_config.model, revision=model_config.revision, local_files_only=True
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return None
    return Path(found)


def _sampled(file: Path) -> bytes:
    size = file.stat().st_size
    digest = hashlib.sha256(f"{file.name} {size}".encode())
    with file.open("rb") as content:
        for start in _starts(size):
            content.seek(start)
            digest.update(content.read(_SAMPLE_BYTES))
    return digest.digest()


def _starts(size: int) -> Iterator[int]:
    """The first sample is a file's first bytes, the last one its last."""
    room = max(size - _SAMPLE_BYTES, 0)
    return (room * number // (_SAMPLES - 1) for number in range(_SAMPLES))
