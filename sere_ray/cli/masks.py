"""The command that trains learned masks."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from sere_ray.cli.common import (
    Device,
    Dtype,
    Model,
    Out,
    Revision,
    TextColumn,
    console,
    user_errors,
)
from sere_ray.util.errors import SereError


def train_masks(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Plain text: parquet, jsonl or text file, or a data set of the hub.")
    ],
    out: Out,
    report: Annotated[
        Path | None, typer.Option(help="JSON of what validation said as it went.")
    ] = None,
    knob: Annotated[
        str,
        typer.Option(help="Weight of the penalty, growing, comma-separated: a level for each."),
    ] = "0.05,0.1,0.2,0.4",
    html: Annotated[Path | None, typer.Option(help="The same as a page with curves.")] = None,
    penalty: Annotated[
        Literal["rows", "batch"],
        typer.Option(help="What is made few: slots of each row, or experts that a batch reads."),
    ] = "batch",
    keep_first: Annotated[
        bool,
        typer.Option("--keep-first/--drop-first", help="Whether rows keep their first choice."),
    ] = True,
    balance: Annotated[float, typer.Option(help="Weight of the load-balance term.")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Of each level.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 16,
    batch: Annotated[
        int, typer.Option(min=1, help="Windows whose rows are a batch of --penalty batch.")
    ] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of Adam; falls to 0 over a level.")] = 0.01,
    sequences: Annotated[int, typer.Option(min=2, help="How many windows of text.")] = 512,
    validation: Annotated[int, typer.Option(min=1, help="Of these, not trained on.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of windows.")] = 0,
    revision: Revision = None,
    text_column: TextColumn = "text",
    device: Device = "auto",
    dtype: Dtype = "auto",
    workers: Annotated[
        int, typer.Option(min=1, help="Copies of the model, on Ray, each on a GPU or a CPU core.")
    ] = 1,
    sync: Annotated[
        Literal["allreduce", "edit", "a-edit"],
        typer.Option(help="Workers meet at every step, after some steps, or after some seconds."),
    ] = "allreduce",
    sync_every: Annotated[int, typer.Option(min=1, help="Steps between meetings of edit.")] = 10,
    sync_seconds: Annotated[float, typer.Option(help="Between meetings of a-edit.")] = 60.0,
    warm_up: Annotated[
        int, typer.Option(min=0, help="First steps of a level, at which edit meets every time.")
    ] = 10,
    ray_address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster; auto: this machine's [one of its own, if --workers]."),
    ] = None,
) -> None:
    """Train masks that leave out experts of MODEL, whose weights stay, and write their file.

    Killed and started again it goes on where it was: OUT.work is there until the file is. Several
    workers need OUT's folder and MODEL on a disk that all of them reach.

    Example: sere-ray train-masks MODEL --data text.jsonl --out MODEL.masks.safetensors
    """
    with user_errors():
        from sere_ray.masks.page import write_training_page
        from sere_ray.masks.plan import TrainSettings
        from sere_ray.masks.train import train_masks as run
        from sere_ray.util.files import file_sha256
        from sere_ray.util.results import write_result

        settings = TrainSettings(
            model=model,
            data=data,
            knobs=_knobs(knob),
            penalty=penalty,
            keep_first=keep_first,
            balance=balance,
            steps=steps,
            batch_size=batch_size,
            batch=batch,
            learning_rate=learning_rate,
            sequences=sequences,
            validation=validation,
            length=length,
            seed=seed,
            revision=revision,
            device=device,
            dtype=dtype,
            text_column=text_column,
            workers=workers,
            sync=sync,
            sync_every=sync_every,
            sync_seconds=sync_seconds,
            warm_up=warm_up,
        )
        trained = run(settings, out, console, address=ray_address)
        about = {k: v for k, v in asdict(settings).items() if k not in ("model", "data")}
        content = {
            "model": trained.artifact.metadata.model_id,
            "data": Path(data).name,
            "settings": about,
            "seconds": round(trained.seconds, 1),
            "processor_seconds": round(trained.processor_seconds, 1),
            "rows": trained.history,
        }
        if report:
            write_result(report, content, row_lines=True)
        if html:
            write_training_page(content, html)
        console.print(f"sha256 {file_sha256(out)}", highlight=False, soft_wrap=True)
    print(out)


def bench_edit(
    out: Out,
    seeds: Annotated[int, typer.Option(min=1, help="Orders of the windows; faults have one.")] = 3,
    steps: Annotated[int, typer.Option(min=20, help="Of each training.")] = 60,
    sync_seconds: Annotated[float, typer.Option(help="Between meetings of a-edit.")] = 1.0,
    knob: Annotated[float, typer.Option(help="Weight of the penalty.")] = 0.1,
) -> None:
    """Four workers train masks of the demo model: all-reduce, EDiT and A-EDiT, with faults.

    Example: sere-ray bench edit --out edit-cpu.json
    """
    with user_errors():
        from sere_ray.bench.edit import measure_edit
        from sere_ray.util.results import write_result

        content = measure_edit(
            seeds=seeds, steps=steps, sync_seconds=sync_seconds, knob=knob, console=console
        )
        write_result(out, content, row_lines=True)
    print(out)


def _knobs(text: str) -> tuple[float, ...]:
    """The numbers of ``--knob``.

    Raises:
        SereError: one is none.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SereError(
            f"--knob = {text!r}: must be numbers above 0, comma-separated, such as 0.05,0.1,0.2"
        ) from None
