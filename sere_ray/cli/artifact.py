"""The commands around artifacts."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sere_ray.cli.common import Out, user_errors

app = typer.Typer(no_args_is_help=True, help="Look at, import or make up an artifact.")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A similarity artifact.")],
    png: Annotated[
        Path | None, typer.Option(help="Heat map; default is FILE with the suffix .png.")
    ] = None,
) -> None:
    """Print origin and per-layer statistics of FILE and draw its matrices.

    Example: sere-ray artifact inspect demo.safetensors
    """
    with user_errors():
        from sere_ray.artifact.report import describe, draw_heat_maps

        picture = png or file.with_suffix(".png")
        Console().print(describe(file))
        draw_heat_maps(file, picture)
    print(picture)


@app.command()
def synthetic(
    config: Annotated[Path, typer.Option(help="A model's config.json, or its folder.")],
    out: Out,
    seed: Annotated[int, typer.Option(help="Seed of the random matrices.")] = 0,
) -> None:
    """Write random matrices for a model's shape: for benchmarks with `--load-format dummy` only.

    Example: sere-ray artifact synthetic --config config.json --out random.safetensors
    """
    with user_errors():
        from sere_ray.calibration.synthetic import synthetic_artifact

        synthetic_artifact(config, seed=seed).save(out)
    print(out)


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(help="similarity_matrices.pt, or a calibrated checkpoint's folder.")
    ],
    model: Annotated[str, typer.Option(help="The plain model's folder or hub name.")],
    out: Out,
    metric: Annotated[
        str | None, typer.Option(help="Which metric the matrices are, if you know.")
    ] = None,
) -> None:
    """Bring over what the published SERE code calibrated. Pickled code is never run.

    Example: sere-ray artifact import similarity_matrices.pt --model ./qwen3 --out q3.safetensors
    """
    with user_errors():
        from sere_ray.calibration.published import import_matrices

        import_matrices(source, model, metric).save(out)
    print(out)
