"""What every way of calibrating does first and last.

First it checks everything that can be refused and cuts the text. While it runs it is the only
writer of its file. Last it turns sums into similarity and writes the file.
"""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.calibration.checkpoint import Checkpoint
from sere_ray.calibration.collect import MoEShape, find_moe_layers, moe_shape
from sere_ray.calibration.data import TextSource, make_windows, open_texts
from sere_ray.calibration.loading import (
    check_dtype,
    empty_model,
    is_local,
    load_config,
    load_tokenizer,
    model_name,
    resolved_revision,
)
from sere_ray.calibration.similarity import Metric, Sums, check_exact_fits, make_sums
from sere_ray.util.errors import ArtifactError, DataError
from sere_ray.util.results import CALIBRATION_LIBRARIES, library_versions


@dataclass(frozen=True)
class CalibrationSettings:
    """What is calibrated on what; the defaults are the recipe of the paper.

    Attributes:
        model: local checkpoint folder or hub name.
        data: text file or dataset, see :func:`~sere_ray.calibration.data.open_texts`.
        revision: branch, tag or commit of a hub model.
        metric: ``frobenius``, ``cosine``, ``cka`` or, for small models, ``cka-exact``.
        sequences: windows of text.
        length: tokens of a window.
        batch_size: windows of a forward pass; does not change the result.
        device: ``auto``, ``cpu`` or a CUDA device.
        dtype: of the weights: ``bfloat16``, ``float32`` or ``auto``, see
            :func:`~sere_ray.calibration.loading.pick_dtype`.
        text_column: column of a parquet, jsonl or hub data set.
        statistics: groups of further statistics: :mod:`sere_ray.artifact.statistics`.
    """

    model: str
    data: str
    revision: str | None = None
    metric: Metric = "frobenius"
    sequences: int = 400
    length: int = 128
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"
    text_column: str = "text"
    statistics: tuple[str, ...] = ()

    def make_sums(self, num_experts: int, device: torch.device | str = "cpu") -> Sums:
        """Empty sums of one layer."""
        return make_sums(self.metric, num_experts, device, self.statistics)


@dataclass(frozen=True)
class CalibrationPlan:
    """Settings that have been checked, and all that a calibration needs besides the weights."""

    settings: CalibrationSettings
    config: PretrainedConfig
    revision: str | None
    """Commit of a hub model."""
    shape: MoEShape
    source: TextSource
    windows: list[list[int]]
    """Token ids."""
    pad_id: int

    @property
    def tokens(self) -> int:
        """How many tokens all windows hold."""
        return sum(map(len, self.windows))


def prepare(settings: CalibrationSettings, out: Path) -> CalibrationPlan:
    """Refuse everything that can be refused before the weights are loaded, and cut the text.

    Raises:
        SereError: the model, the text, the metric or the output path cannot be used.
    """
    settings.make_sums(1)  # refuses an unknown name
    check_dtype(settings.dtype)
    if settings.batch_size < 1:
        raise DataError(f"batch_size = {settings.batch_size}: must be at least 1")
    _check_output(out)
    config = load_config(settings.model, settings.revision)
    revision = resolved_revision(settings.model, settings.revision)
    shape = _check_model(config, settings.length)
    if is_local(settings.model):
        Checkpoint(settings.model)  # refuses a missing shard before the text is read

    source = open_texts(settings.data, settings.text_column)
    tokenizer = load_tokenizer(settings.model, revision)
    windows = make_windows(source.texts, tokenizer, settings.sequences, settings.length)
    plan = CalibrationPlan(settings, config, revision, shape, source, windows, _pad_id(tokenizer))
    if settings.metric == "cka-exact":
        hidden_size = config.get_text_config().hidden_size
        check_exact_fits(len(shape.layers), shape.num_experts, plan.tokens, hidden_size)
    return plan


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Refuse to write a file that another calibration is writing.

    While the block runs it holds a lock on ``.NAME.lock`` beside ``out``. The system frees the lock
    of a process that dies.

    Raises:
        ArtifactError: another process holds the lock.
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


def write_artifact(
    plan: CalibrationPlan, out: Path, sums: Mapping[int, Sums], fingerprints: Mapping[int, str]
) -> SimilarityArtifact:
    """Turn sums into similarity and write the file in one step.

    Args:
        plan: what was run.
        out: the artifact's path; an existing file is replaced.
        sums: over all tokens, by MoE layer.
        fingerprints: of the gates, by MoE layer.

    Raises:
        SereError: no chunk was long enough to count, or the folder cannot be written.
    """
    artifact = SimilarityArtifact(
        layers={index: layer_sums.similarity() for index, layer_sums in sums.items()},
        metadata=ArtifactMetadata(
            model_id=model_name(plan.settings.model),
            revision=plan.revision,
            architecture=plan.shape.architecture,
            num_experts=plan.shape.num_experts,
            top_k=plan.shape.top_k,
            router_fingerprint=dict(fingerprints),
            metric=plan.settings.metric,
            tokens=min(layer_sums.tokens for layer_sums in sums.values()),
            dataset=plan.source.name,
            dataset_revision=plan.source.revision,
            dataset_sha256=plan.source.sha256,
            libraries=library_versions(CALIBRATION_LIBRARIES),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            synthetic=False,
        ),
        statistics={
            index: layer_sums.routed.statistics(layer_sums.tokens)
            for index, layer_sums in sums.items()
            if layer_sums.routed is not None
        },
    )
    artifact.save(out)
    return artifact


def _take(file: IO[str], path: Path) -> bool:
    """Lock the open file, unless another one holds it or has just finished and removed it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


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
    """The id to pad with. Any valid id will do, since padding is masked."""
    pad: int | None = tokenizer.pad_token_id
    return 0 if pad is None else pad
