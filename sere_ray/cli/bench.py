"""The group ``bench``; a command that measures one subject is defined with the others of it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sere_ray.cli import bench_ranks
from sere_ray.cli import calibrate as cli_calibrate
from sere_ray.cli import masks as cli_masks
from sere_ray.cli import observe as cli_observe
from sere_ray.cli import serve as cli_serve
from sere_ray.cli.common import Out, console, names, numbers, saver, user_errors
from sere_ray.util.errors import SereError

app = typer.Typer(no_args_is_help=True, help="Measure, with a result file.")
app.command("edit")(cli_masks.bench_edit)
app.command("metrics-overhead")(cli_observe.metrics_overhead)
app.command("production-score")(cli_observe.production_score)
app.command("calibration")(cli_calibrate.bench_calibration)
app.command("calibration-memory")(cli_calibrate.bench_memory)
app.command("calibration-robustness")(cli_calibrate.bench_robustness)
app.command()(cli_serve.chaos)
app.command()(cli_serve.restart)
app.command("differential")(cli_serve.differential)
app.command("serving-overhead")(cli_serve.serving_overhead)
app.command("dispatch")(bench_ranks.dispatch_bytes)
app.command()(bench_ranks.scale)
app.command("busiest-rank")(bench_ranks.busiest_rank)
app.command("rank-time")(bench_ranks.rank_time)
app.command("replicas")(bench_ranks.replica_reads)
app.command()(bench_ranks.locality)


@app.command("step-time")
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
            "qwen3-235b-a22b",
            "qwen3-30b-a3b-fp8",
            "qwen3-30b-a3b-fp8-tensor",
            "qwen3-30b-a3b-gptq",
            "qwen3-30b-a3b-awq",
            "deepseek-v3-fp8",
            "gpt-oss-120b",
            "qwen1.5-moe-a2.7b",
            "deepseek-v2-lite",
        ],
        typer.Option(help="Random experts for CPUs, 4 or 2 GB; the demo's shape; public shapes."),
    ] = "random-e128",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Only so many layers, for less memory [all].")
    ] = None,
    router: Annotated[
        str, typer.Option(help="uniform and, on a GPU, skewed: some experts are preferred.")
    ] = "uniform",
    arms: Annotated[
        str | None, typer.Option(help="Settings to time, such as off,S=2,margin; stock always is.")
    ] = None,
    masks: Annotated[
        float | None,
        typer.Option(help="Arms with random masks that keep this share of slots, 0.5 to 1."),
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
        from sere_ray.bench.commands import run_step_time
        from sere_ray.bench.engines import on_gpu

        if data_parallel_size > 1:
            from sere_ray.bench.expert_parallel import run_expert_parallel

            if batches:
                raise SereError("--batches: for one rank; use --rows-per-rank")
            if masks is not None:
                raise SereError("--masks: for one rank; leave it out")
            run_expert_parallel(
                model,
                out,
                layers=layers,
                num_ranks=data_parallel_size,
                ways=names(union),
                rows=numbers("--rows-per-rank", rows_per_rank, range(1, 257)),
                repeats=repeats,
                tokens=tokens or (64 if on_gpu() else 10),
                routers=names(router),
                chosen=names(arms) if arms else None,
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
            routers=names(router),
            arms=names(arms) if arms else None,
            compiled=not eager,
            masks=masks,
            append=append,
            profile=profile,
            profile_batch=profile_batch,
            layers=layers,
            console=console,
        )
    print(out)


@app.command()
def speculation(
    out: Out,
    model: Annotated[
        Literal["random-e64", "demo", "qwen3-30b-a3b", "qwen3-30b-a3b-fp8"],
        typer.Option(help="Random experts for CPUs; the demo's shape; public shapes."),
    ] = "random-e64",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Only so many layers, for a dry run [all].")
    ] = None,
    streams: Annotated[int, typer.Option(min=1, max=64, help="Requests at once.")] = 16,
    drafts: Annotated[int, typer.Option(min=1, max=8, help="Of a request and step.")] = 3,
    router: Annotated[
        Literal["uniform", "skewed"], typer.Option(help="skewed, on a GPU: some are preferred.")
    ] = "uniform",
    lanes: Annotated[
        str | None,
        typer.Option(help="ngram and, on a GPU, forced: acceptance [ngram; on a GPU both]."),
    ] = None,
    arms: Annotated[
        str, typer.Option(help="Settings to time; off always is.")
    ] = "off,S=K,S=2,S=1,margin",
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats of a setting.")] = 5,
    steps: Annotated[int, typer.Option(min=1, max=80, help="Timed steps of a repeat.")] = 64,
    eager: Annotated[bool, typer.Option("--eager", help="Without vLLM's compiled graph.")] = False,
) -> None:
    """Speculative decoding: tokens per second re-routed against exact, in one engine a lane.

    The file is written after every lane.

    Example: sere-ray bench speculation --model demo --streams 4 --out speculation-cpu.json
    """
    with user_errors():
        from sere_ray.bench.engines import on_gpu
        from sere_ray.bench.models import get_model, with_layers
        from sere_ray.bench.speculation import SpeculationPlan, measure

        plan = SpeculationPlan(
            model=with_layers(get_model(model), layers),
            streams=streams,
            num_drafts=drafts,
            steps=steps,
            repeats=repeats,
            router=router,
            lanes=names(lanes or ("forced,ngram" if on_gpu() else "ngram")),
            arms=names(arms),
            compiled=not eager,
        )
        measure(plan, console=console, save=saver(out))
    print(out)


@app.command()
def families(
    out: Out,
    only: Annotated[str | None, typer.Option(help="Families, comma-separated [all].")] = None,
) -> None:
    """Families of models, tiny: do they calibrate, start re-routed, and stay exact at S = K?

    The file is written after every family.

    Example: sere-ray bench families --only gpt_oss,granitemoe --out families-cpu.json
    """
    with user_errors():
        from sere_ray.bench.families import run_families

        run_families(names(only) if only else (), saver(out), console=console)
    print(out)


@app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="A result file of another `bench` command.")],
    picture: Annotated[Path, typer.Argument(help="PNG or SVG to write.")],
    model: Annotated[
        str | None, typer.Option(help="Only what was measured on this one [all].")
    ] = None,
) -> None:
    """Draw a result file of `bench step-time` or `scale`.

    Example: sere-ray bench plot step-time.json step-time.png
    """
    with user_errors():
        from sere_ray.bench.plot import draw, of_model
        from sere_ray.util.results import load_result

        document = load_result(result)
        draw(of_model(document, model) if model else document, picture)
    print(picture)


@app.command()
def host(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(help="A file such as loadtest/hosts/two-gpus.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder for results and logs.")],
    minutes: Annotated[float, typer.Option(min=0.01, help="Then all is ended.")] = 25.0,
    archive: Annotated[
        Path | None, typer.Option(help="A .tgz of the folder, written anew every few seconds.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check the plan and print its commands.")] = False,
) -> None:
    """Run all that a plan has for a GPU host: lanes side by side, each on GPUs of its own.

    Example: sere-ray bench host loadtest/hosts/two-gpus.yaml --out results --archive results.tgz
    """
    with user_errors():
        from sere_ray.bench.host import read_plan, run_host
        from sere_ray.bench.host_check import check_commands

        read = read_plan(plan)
        check_commands(read, context.find_root().command, Path())
        if dry_run:
            for lane in read.lanes:
                print(f"{lane.name} on {', '.join(map(str, lane.gpus)) or 'no GPU'}")
                print(*(f"  {command}" for command in lane.commands), sep="\n")
            return
        run_host(read, out, minutes=minutes, archive=archive, console=console)
    print(out)
