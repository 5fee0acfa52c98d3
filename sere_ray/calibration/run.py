"""One-process calibration, from a model and a text to an artifact on disk."""

import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sere_ray.artifact import ArtifactMetadata, SimilarityArtifact, router_fingerprint
from sere_ray.calibration.collect import MoELayer, MoEShape, collect, find_moe_layers, moe_shape
from sere_ray.calibration.data import TextSource, make_batches, make_windows, open_texts
from sere_ray.calibration.loading import (
    empty_model,
    load_config,
    load_model,
    load_tokenizer,
    model_name,
    pick_device,
    resolved_revision,
)
from sere_ray.calibration.similarity import Metric, Sums, check_exact_fits, make_sums
from sere_ray.errors import ArtifactError, DataError
from sere_ray.progress import progress
from sere_ray.results import CALIBRATION_LIBRARIES, library_versions


def calibrate(
    model: str,
    *,
    data: str,
    out: Path,
    revision: str | None = None,
    metric: Metric = "frobenius",
    sequences: int = 400,
    length: int = 128,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    text_column: str = "text",
    console: Console | None = None,
) -> SimilarityArtifact:
    """Measure how similar the experts of a model are on a text, and write the artifact.

    The defaults are the recipe of the paper: 400 sequences of 128 tokens, Frobenius distance.
    Everything that can be refused is refused before the weights are loaded, and the file appears
    whole or not at all.

    Args:
        model: local checkpoint folder or hub name.
        data: text file or dataset, see :func:`~sere_ray.calibration.data.open_texts`.
        out: the artifact's path; an existing file is replaced.
        revision: branch, tag or commit of a hub model.
        metric: ``frobenius``, ``cosine``, ``cka`` or, for small models, ``cka-exact``.
        sequences: windows of text.
        length: tokens of a window.
        batch_size: windows of a forward pass; does not change the result.
        device: ``auto``, ``cpu`` or a CUDA device; holds the whole model.
        dtype: ``auto`` (the checkpoint's), ``bfloat16`` or ``float32``.
        text_column: column of a parquet, jsonl or hub data set.
        console: where progress goes; None = nowhere.

    Returns:
        What has been written to ``out``.

    Raises:
        SereError: the model, the text, the metric or the output path cannot be used.
    """
    make_sums(metric, 1)  # refuses an unknown name
    _check_output(out)
    target = pick_device(device)
    config = load_config(model, revision)
    revision = resolved_revision(model, revision)
    shape = _check_model(config, length)

    source = open_texts(data, text_column)
    tokenizer = load_tokenizer(model, revision)
    windows = make_windows(source.texts, tokenizer, sequences, length)
    tokens = sum(map(len, windows))
    if metric == "cka-exact":
        hidden_size = config.get_text_config().hidden_size
        check_exact_fits(len(shape.layers), shape.num_experts, tokens, hidden_size)
    batches = make_batches(windows, batch_size, _pad_id(tokenizer))

    loaded = load_model(model, revision=revision, device=target, dtype=dtype)
    layers = find_moe_layers(loaded)
    sums = {index: make_sums(metric, shape.num_experts, target) for index in layers}
    with progress(console, tokens, task="calibrate", unit="tokens") as advance:
        collect(loaded, layers, batches, sums, advance)

    artifact = SimilarityArtifact(
        layers={index: layer_sums.similarity() for index, layer_sums in sums.items()},
        metadata=_metadata(model, revision, shape, layers, metric, sums, source),
    )
    artifact.save(out)
    return artifact


def _check_output(out: Path) -> None:
    """Refuse a path that could not be written in the end."""
    if out.is_dir():
        raise ArtifactError(f"out = {str(out)!r}: is a folder; give a file name")
    if not out.parent.is_dir():
        raise ArtifactError(f"out = {str(out)!r}: the folder does not exist; create it")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ArtifactError(
            f"out = {str(out)!r}: the folder cannot be written ({error.strerror}); choose another"
        ) from None


def _check_model(config: PretrainedConfig, length: int) -> MoEShape:
    """Refuse a model or a window length by the configuration alone."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise DataError(f"length = {length}: the model reads at most {longest} tokens")
    model = empty_model(config)
    return moe_shape(model, find_moe_layers(model))


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any valid id will do: padding is masked."""
    pad: int | None = tokenizer.pad_token_id
    return 0 if pad is None else pad


def _metadata(
    model: str,
    revision: str | None,
    shape: MoEShape,
    layers: Mapping[int, MoELayer],
    metric: Metric,
    sums: Mapping[int, Sums],
    source: TextSource,
) -> ArtifactMetadata:
    return ArtifactMetadata(
        model_id=model_name(model),
        revision=revision,
        architecture=shape.architecture,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        router_fingerprint={
            index: router_fingerprint(layer.gate_weight) for index, layer in layers.items()
        },
        metric=metric,
        tokens=min(layer_sums.tokens for layer_sums in sums.values()),
        dataset=source.name,
        dataset_revision=source.revision,
        dataset_sha256=source.sha256,
        libraries=library_versions(CALIBRATION_LIBRARIES),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        synthetic=False,
    )
