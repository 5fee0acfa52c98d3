"""The commands around calibration."""

from typing import Annotated, Literal

import typer

from sere_ray.cli_common import Out, console, user_errors


def calibrate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub name.")],
    data: Annotated[
        str, typer.Option(help="parquet, jsonl or text file, or a data set of the hub.")
    ],
    out: Out,
    metric: Annotated[
        Literal["frobenius", "cosine", "cka", "cka-exact"],
        typer.Option(help="How alike two experts' outputs are."),
    ] = "frobenius",
    sequences: Annotated[int, typer.Option(min=1, help="How many windows of text.")] = 400,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 128,
    revision: Annotated[str | None, typer.Option(help="Branch or commit of a hub model.")] = None,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a forward pass.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="Of the weights; auto: the checkpoint's, on a CPU float32."),
    ] = "auto",
    layer_streamed: Annotated[
        bool,
        typer.Option("--layer-streamed", help="Hold one decoder layer at a time, not the model."),
    ] = False,
) -> None:
    """Measure how alike the experts of MODEL are and write the similarity artifact.

    Example: sere-ray calibrate Qwen/Qwen3-30B-A3B --data fineweb-edu.parquet --out q3.safetensors
    """
    with user_errors():
        from sere_ray.calibration import calibrate as run

        run(
            model,
            revision=revision,
            data=data,
            metric=metric,
            sequences=sequences,
            length=length,
            out=out,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            text_column=text_column,
            layer_streamed=layer_streamed,
            console=console,
        )
    print(out)
