"""One-process calibration, from a model and a text to an artifact on disk."""

from pathlib import Path

from rich.console import Console

from sere_ray.artifact.gates import router_fingerprint
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.calibration.checkpoint import Checkpoint
from sere_ray.calibration.collect import collect, find_moe_layers
from sere_ray.calibration.data import make_batches
from sere_ray.calibration.loading import load_model, pick_device, pick_dtype
from sere_ray.calibration.plan import (
    CalibrationPlan,
    CalibrationSettings,
    only_writer,
    prepare,
    write_artifact,
)
from sere_ray.calibration.similarity import Metric, Sums
from sere_ray.calibration.streamed import StreamedModel
from sere_ray.util.progress import progress

Collected = tuple[dict[int, Sums], dict[int, str]]
"""Sums and router fingerprints, by MoE layer."""


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
    statistics: tuple[str, ...] = (),
    layer_streamed: bool = False,
    console: Console | None = None,
) -> SimilarityArtifact:
    """Measure how similar the experts of a model are on a text, and write the artifact.

    Everything that can be refused is refused before the weights are loaded, and the file appears
    whole or not at all.

    Args:
        model: this and all up to ``statistics`` are the fields of
            :class:`~sere_ray.calibration.plan.CalibrationSettings`.
        out: the artifact's path; an existing file is replaced.
        layer_streamed: hold one decoder layer at a time on the device, not the whole model.
        console: where progress goes; None = nowhere.

    Returns:
        What has been written to ``out``.

    Raises:
        SereError: the model, the text, the metric or the output path cannot be used.
    """
    settings = CalibrationSettings(
        *(model, data, revision, metric, sequences, length, batch_size, device, dtype),
        *(text_column, statistics),
    )
    pick_device(device)  # refuses what this machine lacks
    plan = prepare(settings, out)
    with only_writer(out):
        run = _streamed if layer_streamed else _whole
        return write_artifact(plan, out, *run(plan, console))


def _whole(plan: CalibrationPlan, console: Console | None) -> Collected:
    """Calibrate with the whole model on the device."""
    settings = plan.settings
    target = pick_device(settings.device)
    loaded = load_model(
        settings.model,
        revision=plan.revision,
        device=target,
        dtype=pick_dtype(settings.dtype, target, plan.config),
    )
    layers = find_moe_layers(loaded)
    sums = {index: settings.make_sums(plan.shape.num_experts, target) for index in layers}
    batches = make_batches(plan.windows, settings.batch_size, plan.pad_id)
    with progress(console, plan.tokens, task="calibrate", unit="tokens") as advance:
        collect(loaded, layers, batches, sums, advance)
    gates = {index: router_fingerprint(layer.gate_weight) for index, layer in layers.items()}
    return sums, gates


def _streamed(plan: CalibrationPlan, console: Console | None) -> Collected:
    """Calibrate with one decoder layer on the device at a time."""
    settings = plan.settings
    target = pick_device(settings.device)
    source = StreamedModel(
        plan.config,
        Checkpoint(settings.model, plan.revision),
        target,
        pick_dtype(settings.dtype, target, plan.config),
    )
    batches = make_batches(plan.windows, settings.batch_size, plan.pad_id)
    steps = plan.tokens * source.num_layers
    with progress(console, steps, task="calibrate", unit="tokens x layers") as advance:
        return source.collect(
            batches, lambda: settings.make_sums(plan.shape.num_experts, target), advance
        )
