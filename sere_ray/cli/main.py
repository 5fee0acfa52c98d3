"""The ``sere-ray`` command. Parses, calls the library, prints; no logic of its own."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sere_ray import __version__
from sere_ray.cli import artifact as cli_artifact
from sere_ray.cli import bench as cli_bench
from sere_ray.cli import calibrate as cli_calibrate
from sere_ray.cli import loadtest as cli_loadtest
from sere_ray.cli import observe as cli_observe
from sere_ray.cli import quality as cli_quality
from sere_ray.cli import serve as cli_serve
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

        vllm serve MODEL --additional-config
          '{"sere": {"similarity": "MODEL.sere.safetensors", "select_top_k": 2}}'
    """,
)
app.add_typer(cli_artifact.app, name="artifact")
app.add_typer(cli_bench.app, name="bench")
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
