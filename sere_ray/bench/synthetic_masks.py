"""Masks that leave out a given share of slots, for benchmarks with dummy weights."""

from datetime import UTC, datetime
from pathlib import Path

import torch

from sere_ray.calibration.collect import find_moe_layers, moe_shape
from sere_ray.calibration.loading import empty_model, load_config, model_name
from sere_ray.masks.artifact import Level, MasksArtifact, MasksMetadata
from sere_ray.util.errors import SereError

LEAST_KEPT = 0.5


def synthetic_masks(config_path: Path, kept: float, seed: int = 0) -> MasksArtifact:
    """One level of masks that keep about this share of the slots, by the row.

    A mask keeps a slot where its router's number is not below 0. So a router of random numbers
    keeps half of them, and one of zeros all: some experts have the first, the others the second.
    Like an artifact of :func:`~sere_ray.calibration.synthetic.synthetic_artifact` it names no gate,
    so an engine takes it with dummy weights only.

    Args:
        config_path: a ``config.json`` or a folder that has one.
        kept: share of slots, ``LEAST_KEPT`` to 1.
        seed: of the random numbers.

    Raises:
        SereError: a share outside the range, or no model with MoE layers.
    """
    if not LEAST_KEPT <= kept <= 1:
        raise SereError(f"--masks = {kept}: must be {LEAST_KEPT} to 1, the share of slots kept")
    config = load_config(str(config_path))
    model = empty_model(config)
    shape = moe_shape(model, find_moe_layers(model))
    size = shape.num_experts, config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in shape.layers:
        weights[layer] = torch.randn(size, generator=generator)
        order = torch.randperm(shape.num_experts, generator=generator)
        weights[layer][order[round(2 * (1 - kept) * shape.num_experts) :]] = 0.0
    metadata = MasksMetadata(
        model_id=model_name(str(config_path)),
        revision=None,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        router_fingerprint={},
        levels=[Level(knob=0.0, slots_kept=kept, experts_kept=1.0, kl_mean=0.0)],
        keep_first=False,
        penalty="rows",
        batch=1,
        balance=0.0,
        tokens=0,
        dataset="synthetic",
        synthetic=True,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return MasksArtifact({1: weights}, metadata)
