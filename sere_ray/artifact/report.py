"""Look at an artifact: a table of its layers and a heat map of its matrices."""

import math
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.util.files import atomic_path, file_sha256


def describe(path: Path) -> Group:
    """Origin and per-layer statistics, to be printed by rich.

    Raises:
        ArtifactError: the file is not a sound artifact.
    """
    artifact = SimilarityArtifact.load(path)
    origin = Table(show_header=False, box=None, pad_edge=False)
    origin.add_row("file", Text(str(path)))
    origin.add_row("sha256", file_sha256(path))
    for name, value in artifact.metadata.model_dump(exclude={"strengths"}).items():
        shown = f"{len(value)} layers" if name == "router_fingerprint" else value
        origin.add_row(name, Text(str(shown)))
    for rule, strength in artifact.metadata.strengths.items():
        low, high = strength.range
        shown = f"{low:.2g} to {high:.2g}, worst of {', '.join(strength.tasks)} on {strength.data}"
        origin.add_row(f"loss under {rule}", Text(shown))
    return Group(origin, Text(), _layer_table(artifact))


def _layer_table(artifact: SimilarityArtifact) -> Table:
    table = Table(title="similarity of pairs of different experts")
    columns = ("layer", "min", "median", "mean", "max", "median of best", "lonely")
    for name in columns:
        table.add_column(name, justify="right")
    for layer, matrix in sorted(artifact.layers.items()):
        pairs = off_diagonal(matrix)
        best = pairs.max(dim=1).values
        table.add_row(
            str(layer),
            *(
                f"{float(value):.3f}"
                for value in (pairs.min(), pairs.median(), pairs.mean(), pairs.max(), best.median())
            ),
            str(int((best < 0.3).sum())),
        )
    table.caption = "best: an expert's most similar other one; lonely: experts whose best is < 0.3"
    return table


def off_diagonal(matrix: Tensor) -> Tensor:
    """``[E, E - 1]``: each row without its own expert."""
    size = matrix.shape[0]
    return matrix[~torch.eye(size, dtype=torch.bool)].view(size, size - 1)


def draw_heat_maps(path: Path, picture: Path) -> None:
    """Write one PNG with a heat map for each layer.

    Raises:
        ArtifactError: the file is not a sound artifact, or the folder cannot be written.
    """
    from matplotlib.figure import Figure

    artifact = SimilarityArtifact.load(path)
    columns = min(8, math.ceil(math.sqrt(len(artifact.layers))))
    rows = math.ceil(len(artifact.layers) / columns)
    figure = Figure(figsize=(2.6 * columns + 1.2, 2.6 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (layer, matrix) in zip(grid.flat, sorted(artifact.layers.items()), strict=False):
        axes.set_axis_on()
        image = axes.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis")
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.tick_params(labelsize=6)
    if image is not None:
        figure.colorbar(image, ax=grid, label="similarity", shrink=0.8)
    figure.suptitle(
        f"{artifact.metadata.model_id}: {artifact.metadata.metric} similarity of experts"
    )
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
