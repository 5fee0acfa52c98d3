"""The ``sere-ray`` command. Parses, calls the library, prints; no logic of its own."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sere_ray import __version__
from sere_ray.cli import advise as cli_advise
from sere_ray.cli import artifact as cli_artifact
from sere_ray.cli import bench as cli_bench
from sere_ray.cli import calibrate as cli_calibrate
from sere_ray.cli import compare as cli_compare
from sere_ray.cli import examples as cli_examples
from sere_ray.cli import loadtest as cli_loadtest
from sere_ray.cli import masks as cli_masks
from sere_ray.cli import observe as cli_observe
from sere_ray.cli import quality as cli_quality
from sere_ray.cli import serve as cli_serve
from sere_ray.cli import strength as cli_strength
from sere_ray.cli.common import console, numbers, user_errors

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

        sere-ray tune MODEL --similarity MODEL.sere.safetensors --data text.jsonl
          --check other.jsonl --max-kl 0.01 --rules margin --out policy.yaml

        sere-ray serve --config deploy/one-gpu.yaml     # a file of `sere-ray examples`

    Without Ray Serve, vLLM alone takes the policy, too:

        vllm serve MODEL --additional-config
          '{"sere": {"similarity": "MODEL.sere.safetensors", "select_top_k": 2}}'
    """,
)
_FIRST = "First steps, in this order"
_RUNNING = "A running deployment"
_MEASURE = "Measure"
_WATCH = "Watch"


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


@app.command(rich_help_panel=_FIRST)
def demo(
    json: Annotated[Path | None, typer.Option(help="Write the measured numbers.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with tables and plots.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the endpoint up afterwards.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8000,
    concurrency: Annotated[
        str, typer.Option(help="Streams at a time: any of 1, 2, 4, 8, 16, 32, comma-separated.")
    ] = "16",
    problems: Annotated[
        int, typer.Option(min=1, max=128, help="Most arithmetic problems sent for each setting.")
    ] = 128,
    eager: Annotated[
        bool, typer.Option("--eager", help="Without vLLM's compiled graph: starts sooner.")
    ] = False,
) -> None:
    """Compare exact and re-routed on a CPU: loss, speed of a large model, answers as served.

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
            problems=problems,
            eager=eager,
            console=console,
        )


# `--help` shows panels and commands in the order in which they are added; groups follow commands.
for panel, commands in {
    _FIRST: (
        cli_calibrate.calibrate,
        cli_quality.tune,
        cli_advise.advise,
        cli_serve.serve,
        cli_examples.examples,
    ),
    _RUNNING: (cli_serve.stats, cli_serve.key),
    _MEASURE: (
        cli_quality.evaluate,
        cli_quality.tasks,
        cli_strength.strength,
        cli_masks.train_masks,
        cli_compare.compare,
        cli_advise.speed,
    ),
    _WATCH: (cli_observe.monitor_demo,),
}.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
for name, group, panel in (
    ("policy", cli_serve.policy_app, _RUNNING),
    ("artifact", cli_artifact.app, _MEASURE),
    ("loadtest", cli_loadtest.app, _MEASURE),
    ("bench", cli_bench.app, _MEASURE),
    ("dashboards", cli_observe.dashboards_app, _WATCH),
):
    app.add_typer(group, name=name, rich_help_panel=panel)
