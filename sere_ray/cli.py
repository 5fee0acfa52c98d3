"""The ``sere-ray`` command. Parses, calls the library, prints; no logic of its own."""

import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from sere_ray import (
    __version__,
    cli_calibrate,
    cli_loadtest,
    cli_observe,
    cli_quality,
    cli_serve,
    cli_serving_bench,
)
from sere_ray.cli_common import Out, console, numbers, user_errors
from sere_ray.errors import SereError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Serve mixture-of-experts models faster: batch-level expert re-routing for vLLM.

    In a decode step of a batch almost every expert is read from memory. Re-routing keeps the
    experts that some token wants most and sends the other choices to the most similar kept one.

    First steps:

        sere-ray demo                                   # see it on a laptop, no GPU

        sere-ray calibrate MODEL --data text.jsonl --out MODEL.sere.safetensors

        vllm serve MODEL --additional-config
          '{"sere": {"similarity": "MODEL.sere.safetensors", "select_top_k": 2}}'
    """,
)
artifact_app = typer.Typer(no_args_is_help=True, help="Look at, import or make up an artifact.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure, with a result file.")
app.add_typer(artifact_app, name="artifact")
app.add_typer(bench_app, name="bench")
app.add_typer(cli_serve.policy_app, name="policy")
app.add_typer(cli_loadtest.app, name="loadtest")
app.add_typer(cli_observe.dashboards_app, name="dashboards")
for command in (
    cli_calibrate.calibrate,
    cli_serve.serve,
    cli_serve.stats,
    cli_serve.key,
    cli_quality.evaluate,
    cli_quality.tune,
    cli_observe.monitor_demo,
):
    app.command()(command)
bench_app.command("metrics-overhead")(cli_observe.metrics_overhead)
bench_app.command("calibration")(cli_calibrate.bench_calibration)
bench_app.command("calibration-memory")(cli_calibrate.bench_memory)
bench_app.command("calibration-robustness")(cli_calibrate.bench_robustness)
bench_app.command()(cli_serving_bench.chaos)
bench_app.command("serving-overhead")(cli_serving_bench.serving_overhead)


def _decimals(option: str, text: str) -> list[float]:
    """The numbers from 0 to 1 of a comma-separated option."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value <= 1 for value in values):
        raise SereError(f"{option} = {text!r}: must be numbers from 0 to 1, comma-separated")
    return values


def _names(text: str) -> tuple[str, ...]:
    """The names of a comma-separated option."""
    return tuple(part.strip() for part in text.split(","))


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Batch-level expert re-routing."""
    if not sys.platform.startswith("linux"):
        console.print("error: sere-ray runs on Linux; use a container or WSL2", style="red")
        raise typer.Exit(2)
    if version:
        print(__version__)
        raise typer.Exit()


@artifact_app.command()
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
        from sere_ray.artifact_report import describe, draw_heat_maps

        picture = png or file.with_suffix(".png")
        Console().print(describe(file))
        draw_heat_maps(file, picture)
    print(picture)


@artifact_app.command()
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


@artifact_app.command("import")
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
        from sere_ray.artifact_import import import_matrices

        import_matrices(source, model, metric).save(out)
    print(out)


@app.command()
def demo(
    json: Annotated[Path | None, typer.Option(help="Write the measured numbers.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with tables and plots.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the endpoint up afterwards.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8000,
    concurrency: Annotated[
        str, typer.Option(help="Streams at a time: any of 1, 2, 4, 8, 16, 32, comma-separated.")
    ] = "1,4,16",
) -> None:
    """Serve a small trained model on CPU through Ray Serve, exact and re-routed, and compare.

    Example: sere-ray demo --json demo.json --html demo.html
    """
    with user_errors():
        from sere_ray.demo.run import run_demo

        run_demo(
            json=json,
            html=html,
            keep=keep,
            port=port,
            concurrencies=numbers("--concurrency", concurrency, (1, 2, 4, 8, 16, 32)),
            console=console,
        )


@bench_app.command("step-time")
def step_time(
    out: Out,
    batches: Annotated[
        str | None,
        typer.Option(help="Decode batch sizes, comma-separated [1,4,16; on a GPU 1,2,4,..,128]."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats of a point.")] = 5,
    tokens: Annotated[
        int | None,
        typer.Option(min=4, max=500, help="Timed decode steps of a repeat [10; on a GPU 64]."),
    ] = None,
    model: Annotated[
        Literal[
            "random-e128",
            "random-e64",
            "demo",
            "qwen3-30b-a3b",
            "qwen1.5-moe-a2.7b",
            "deepseek-v2-lite",
        ],
        typer.Option(help="Random experts for CPUs, 4 or 2 GB; the demo's shape; public shapes."),
    ] = "random-e128",
    router: Annotated[
        str, typer.Option(help="uniform and, on a GPU, skewed: some experts are preferred.")
    ] = "uniform",
    arms: Annotated[
        str | None, typer.Option(help="Settings to time, such as off,S=2,margin; stock always is.")
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Without vLLM's compiled graph.")] = False,
    append: Annotated[
        bool, typer.Option("--append", help="Keep the rows that the file has from this machine.")
    ] = False,
    profile: Annotated[
        Path | None, typer.Option(help="Write the kernels of stock and S=1, too (GPU).")
    ] = None,
    profile_batch: Annotated[int, typer.Option(min=1, help="Its batch or rows per rank.")] = 16,
    data_parallel_size: Annotated[
        int, typer.Option(min=1, max=8, help="Ranks with data and expert parallelism, a GPU each.")
    ] = 1,
    rows_per_rank: Annotated[
        str, typer.Option(help="With several ranks, in place of --batches.")
    ] = "8,16,32,64",
    union: Annotated[
        str, typer.Option(help="With several ranks: of global, local, before-dispatch.")
    ] = "global,local",
) -> None:
    """Decode step time: stock vLLM against this plugin, interleaved in one run.

    The file is written after every batch size.

    Example: sere-ray bench step-time --out step-time-cpu.json
    """
    with user_errors():
        from sere_ray.evaluation.bench import run_step_time
        from sere_ray.evaluation.engines import on_gpu

        if data_parallel_size > 1:
            from sere_ray.evaluation.expert_parallel import run_expert_parallel

            if batches:
                raise SereError("--batches: for one rank; use --rows-per-rank")
            run_expert_parallel(
                model,
                out,
                num_ranks=data_parallel_size,
                ways=_names(union),
                rows=numbers("--rows-per-rank", rows_per_rank, range(1, 257)),
                repeats=repeats,
                tokens=tokens or (64 if on_gpu() else 10),
                routers=_names(router),
                chosen=_names(arms) if arms else None,
                compiled=not eager,
                append=append,
                profile=profile,
                profile_rows=profile_batch,
                console=console,
            )
            print(out)
            return
        default = "1,2,4,8,16,32,64,128" if on_gpu() else "1,4,16"
        run_step_time(
            model,
            out,
            batches=numbers("--batches", batches or default, range(1, 257)),
            repeats=repeats,
            tokens=tokens or (64 if on_gpu() else 10),
            routers=_names(router),
            arms=_names(arms) if arms else None,
            compiled=not eager,
            append=append,
            profile=profile,
            profile_batch=profile_batch,
            console=console,
        )
    print(out)


@bench_app.command("dispatch")
def dispatch_bytes(
    out: Out,
    ranks: Annotated[
        str, typer.Option(help="Sizes of the group, 2 to 8, comma-separated.")
    ] = "2,4",
    rows_per_rank: Annotated[
        int, typer.Option(min=1, help="Decode rows of a rank; at most 32 over all ranks.")
    ] = 8,
    prefer_local_rank: Annotated[
        str, typer.Option(help="Tolerances to measure beside null, comma-separated.")
    ] = "0.02,0.05,0.1",
    similarity: Annotated[
        Path | None, typer.Option(help="Artifact of the demo model [calibrated first].")
    ] = None,
) -> None:
    """Bytes between expert-parallel ranks: the demo model's routing through real gloo processes.

    Example: sere-ray bench dispatch --ranks 2,4 --out dispatch-cpu.json
    """
    with user_errors():
        from sere_ray.evaluation.bench import run_dispatch

        run_dispatch(
            out,
            group_sizes=numbers("--ranks", ranks, range(2, 9)),
            rows_per_rank=rows_per_rank,
            tolerances=_decimals("--prefer-local-rank", prefer_local_rank),
            similarity=similarity,
            console=console,
        )
    print(out)


@bench_app.command()
def failover(out: Out) -> None:
    """Quality of the demo model with experts gone: re-routed by similarity, at random, dropped.

    Takes a few minutes on two cores. The file is written after every number of ranks.

    Example: sere-ray bench failover --out failover.json
    """
    with user_errors():
        from sere_ray.evaluation.failover import run_failover
        from sere_ray.results import write_result

        run_failover(lambda content: write_result(out, content), console=console)
    print(out)


@bench_app.command()
def scale(out: Out) -> None:
    """Simulate 8 to 256 ranks: experts read, destination ranks and bytes. Nothing is timed.

    Example: sere-ray bench scale --out scale-simulated.json
    """
    with user_errors():
        from sere_ray.evaluation.scale import run_scale
        from sere_ray.results import write_result

        run_scale(lambda content: write_result(out, content), console=console)
    print(out)


@bench_app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="A result file of another `bench` command.")],
    picture: Annotated[Path, typer.Argument(help="PNG or SVG to write.")],
) -> None:
    """Draw a result file of `bench step-time`, `failover` or `scale`.

    Example: sere-ray bench plot step-time.json step-time.png
    """
    with user_errors():
        from sere_ray.evaluation.plot import draw
        from sere_ray.results import load_result

        draw(load_result(result), picture)
    print(picture)
