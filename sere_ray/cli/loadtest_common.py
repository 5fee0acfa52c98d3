"""What commands of the load test share: options, and what is done with a result."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sere_ray.cli.common import as_root, console

Url = Annotated[str, typer.Option(help="Of the endpoint.", callback=as_root)]
Workload = Annotated[
    Path | None, typer.Option(help="JSON lines of prompt and max_tokens [arithmetic].")
]
Model = Annotated[str | None, typer.Option(help="Name to ask for [the first that is served].")]
Keys = Annotated[
    Path | None,
    typer.Option(help="YAML list of API keys, tiers and weights [one in OPENAI_API_KEY]."),
]
Api = Annotated[Literal["chat", "completions"], typer.Option(help="Which OpenAI route.")]
Slo = Annotated[
    str, typer.Option(help="Milliseconds that a request must keep, such as ttft=500,tpot=50.")
]
Price = Annotated[float | None, typer.Option(help="Dollars per GPU and hour, for the cost.")]
Gpus = Annotated[int, typer.Option(min=1, help="GPUs that are paid.")]
Require = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Exit with 1 if a smaller share of requests keeps the SLO."),
]
Processes = Annotated[int, typer.Option(min=1, max=64, help="Processes that send.")]
MaxLag = Annotated[float, typer.Option(help="Event loop lateness (p99) that is accepted.")]
Seconds = Annotated[float, typer.Option(min=1, help="Measured seconds of a block.")]
Warmup = Annotated[float, typer.Option(min=0, help="Seconds before them, dropped.")]
Rounds = Annotated[int, typer.Option(min=1, help="Blocks of each policy.")]
Policies = Annotated[
    str,
    typer.Option(
        help="off, observe, auto, S=2, S=1:threshold=0.3, rule=margin:tau=0.01:union=local, "
        "FILE.yaml of `tune` ..; the first is the base."
    ),
]
Cache = Annotated[
    Literal["cold", "block", "server"],
    typer.Option(help="Prefix cache: salt for each request, for each block, or none."),
]
Stall = Annotated[float, typer.Option(min=0.1, help="Seconds without a byte that end a request.")]
Seed = Annotated[int, typer.Option(help="Of order, prompts and arrivals.")]
Html = Annotated[Path | None, typer.Option(help="Page to write, self-contained.")]
Csv = Annotated[Path | None, typer.Option(help="Rows as CSV.")]
Png = Annotated[Path | None, typer.Option(help="The page's picture.")]


def finish(
    content: dict[str, Any],
    out: Path,
    html: Path | None,
    csv: Path | None,
    png: Path | None,
    max_lag_ms: float,
    required: float | None,
) -> None:
    """Write everything, then say whether it may be believed and is good enough.

    Raises:
        SereError: the generator was later than ``max_lag_ms``.
        typer.Exit: a smaller share than ``required`` kept the SLO.
    """
    from sere_ray.loadtest.report import write_reports
    from sere_ray.loadtest.slo import broken_slo, check_generator
    from sere_ray.util.results import load_result, write_result

    write_result(out, content)
    write_reports(load_result(out), html_file=html, csv_file=csv, png=png)
    for path in filter(None, (out, html, csv, png)):
        print(path)
    check_generator(content, max_lag_ms)
    broken = [] if required is None else broken_slo(content, required)
    for line in broken:
        console.print(line, style="red", markup=False, soft_wrap=True)
    if broken:
        raise typer.Exit(1)


def price(usd_per_gpu_hour: float | None, gpus: int) -> Any:
    """What GPUs cost; None: nobody said it."""
    from sere_ray.loadtest.slo import Price

    return None if usd_per_gpu_hour is None else Price(usd_per_gpu_hour, gpus)
