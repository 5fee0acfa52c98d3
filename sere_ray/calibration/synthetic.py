"""Random similarity matrices, for benchmarks with dummy weights."""

from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.calibration.collect import find_moe_layers, moe_shape
from sere_ray.calibration.loading import empty_model, load_config, model_name


def synthetic_artifact(
    config_path: Path | str, seed: int = 0, *, directed: bool = False
) -> SimilarityArtifact:
    """An artifact of random numbers that fits the model of a configuration.

    It is marked ``synthetic`` and has no router fingerprint: the engine accepts it only with
    dummy weights.

    Args:
        config_path: a ``config.json`` or a folder that has one.
        seed: of the random numbers; the same seed gives the same matrices.
        directed: also what the rule ``spare`` reads, losses even over 0..1.

    Raises:
        SereError: no such configuration, or its model has no MoE layers.
    """
    model = empty_model(load_config(str(config_path)))
    shape = moe_shape(model, find_moe_layers(model))
    generator = torch.Generator().manual_seed(seed)
    layers = {index: _random_matrix(shape.num_experts, generator) for index in shape.layers}
    statistics = {
        index: _random_stand_ins(shape.num_experts, generator) for index in shape.layers if directed
    }
    metadata = ArtifactMetadata(
        model_id=model_name(str(config_path)),
        revision=None,
        architecture=shape.architecture,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        metric="synthetic",
        tokens=0,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        synthetic=True,
    )
    return SimilarityArtifact(layers, metadata, statistics=statistics)


def _random_matrix(size: int, generator: torch.Generator) -> Tensor:
    """``[size, size]`` float32: symmetric, uniform in [0, 1), diagonal 1."""
    upper = torch.rand(size, size, generator=generator).triu(1)
    return (upper + upper.T).fill_diagonal_(1.0)


def _random_stand_ins(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """``[size, size]`` float32 each: losses of 0..1, and scales of 0.5..1.5."""
    loss, scale = torch.rand((2, size, size), generator=generator)
    return {
        "directed_loss": loss.fill_diagonal_(0.0),
        "directed_scale": (0.5 + scale).fill_diagonal_(1.0),
    }
