"""The commands of the load test."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from sere_ray.cli import loadtest_demo as cli_loadtest_demo
from sere_ray.cli.common import DEFAULT_URL, Out, console, saver, user_errors
from sere_ray.cli.loadtest_common import (
    Api,
    Cache,
    Csv,
    Gpus,
    Html,
    Keys,
    MaxLag,
    Model,
    Png,
    Policies,
    Price,
    Processes,
    Require,
    Rounds,
    Seconds,
    Seed,
    Slo,
    Stall,
    Url,
    Warmup,
    Workload,
    finish,
    price,
)
from sere_ray.util.errors import SereError

app = typer.Typer(no_args_is_help=True, help="Latency and cost of an endpoint, from outside.")


@app.callback()
def check_installed() -> None:
    """Say what is missing before any command of the group."""
    with user_errors():
        if find_spec("gevent") is None:
            raise SereError("the load test needs 'gevent': pip install 'sere-ray[loadtest]'")


@app.command()
def run(
    out: Out,
    url: Url = DEFAULT_URL,
    streams: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: users that wait for their answer.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: requests per second, whatever comes back.")
    ] = None,
    burstiness: Annotated[float, typer.Option(help="Of arrivals: 1 Poisson, less = burstier.")] = 1,
    steps: Annotated[
        str | None, typer.Option(help="Open loop: SECONDSxRATE, ..., such as 20x1,20x4.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Replay Mooncake's .jsonl or BurstGPT's .csv.")
    ] = None,
    speed: Annotated[float, typer.Option(min=0.01, help="Of the replay.")] = 1.0,
    workload: Workload = None,
    seconds: Seconds = 30,
    warmup: Warmup = 5,
    model: Model = None,
    api: Api = "chat",
    keys: Keys = None,
    slo: Slo = "",
    usd_per_gpu_hour: Price = None,
    gpus: Gpus = 1,
    require_slo: Require = None,
    stall: Stall = 30,
    processes: Processes = 1,
    max_lag_ms: MaxLag = 50,
    seed: Seed = 0,
    html: Html = None,
    csv: Csv = None,
) -> None:
    """Load any OpenAI endpoint and report latency, goodput and cost.

    Example: sere-ray loadtest run --rate 2 --slo ttft=500,tpot=50 --out run.json
    """
    with user_errors():
        from dataclasses import replace

        from sere_ray.loadtest.arrivals import Arrivals, parse_steps
        from sere_ray.loadtest.options import make_plan
        from sere_ray.loadtest.single import run_single
        from sere_ray.loadtest.slo import Slo as Limits

        if sum(value is not None for value in (streams, rate, steps, trace)) != 1:
            raise SereError("give one of --streams, --rate, --steps and --trace")
        plan = make_plan(
            url,
            model=model,
            api=api,
            keys_file=keys,
            workload=workload,
            trace=trace,
            speed=speed,
            stall=stall,
        )
        if trace is None:
            plan = replace(plan, seconds=seconds, warmup=warmup)
        plan = replace(plan, streams=streams, seed=seed)
        if rate is not None:
            plan = replace(plan, arrivals=Arrivals.at(rate, burstiness))
        elif steps is not None:
            arrivals = Arrivals.checked(parse_steps(steps), burstiness)
            plan = replace(plan, arrivals=arrivals, seconds=arrivals.seconds, warmup=0)
        limits = Limits.parse(slo)
        content = run_single(plan, limits, price(usd_per_gpu_hour, gpus), processes, console)
        finish(content, out, html, csv, None, max_lag_ms, require_slo)


def compare(
    out: Out,
    url: Url = DEFAULT_URL,
    policies: Policies = "off,S=2,S=1",
    streams: Annotated[
        str | None, typer.Option(help="Closed loop: users that wait, such as 16 or 4,16,64.")
    ] = None,
    rates: Annotated[
        str | None, typer.Option(help="Open loop: Poisson requests per second, such as 2 or 1,2,4.")
    ] = None,
    rounds: Rounds = 4,
    seconds: Seconds = 15,
    warmup: Warmup = 3,
    workload: Workload = None,
    model: Model = None,
    api: Api = "chat",
    keys: Keys = None,
    slo: Slo = "",
    usd_per_gpu_hour: Price = None,
    gpus: Gpus = 1,
    require_slo: Require = None,
    cache: Cache = "cold",
    stall: Stall = 30,
    processes: Processes = 1,
    max_lag_ms: MaxLag = 50,
    seed: Seed = 0,
    html: Html = None,
    csv: Csv = None,
    png: Png = None,
) -> None:
    """Policies of one deployment against each other, in interleaved blocks of one run.

    The admin token is in SERE_ADMIN_TOKEN. The policy is put back afterwards, whatever happens.
    With several loads (`sweep` is the same command) the file is written after each.

    Example: sere-ray loadtest ab --streams 16 --policies off,S=2,S=1 --slo tpot=50 --out ab.json
    """
    with user_errors():
        from dataclasses import replace

        from sere_ray.loadtest.ab import Comparison, run_comparison
        from sere_ray.loadtest.options import make_plan, parse_amounts
        from sere_ray.loadtest.policies import parse_policies
        from sere_ray.loadtest.slo import Slo as Limits

        plan = make_plan(url, model=model, api=api, keys_file=keys, workload=workload, stall=stall)
        comparison = Comparison(
            url,
            replace(plan, seconds=seconds, warmup=warmup, seed=seed, cache=cache),
            parse_amounts(streams, rates),
            parse_policies(policies),
            rounds,
            Limits.parse(slo),
            price(usd_per_gpu_hour, gpus),
            processes,
        )
        content = run_comparison(comparison, saver(out), console)
        finish(content, out, html, csv, png, max_lag_ms, require_slo)


for _name in ("ab", "sweep"):
    app.command(_name)(compare)
for _command in (cli_loadtest_demo.demo, cli_loadtest_demo.soak):
    app.command()(_command)


@app.command()
def check(
    out: Out,
    streams: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="Of each rate.")] = 8,
) -> None:
    """Can the generator be trusted here? Its times against a stub that wrote down its own.

    Example: sere-ray loadtest check --out loadtest-generator.json
    """
    with user_errors():
        from sere_ray.loadtest.check import run_check

        run_check(
            saver(out),
            streams=streams,
            seconds=seconds,
            console=console,
        )
    print(out)


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="A result file of run, ab or sweep.")],
    html: Html = None,
    csv: Csv = None,
    png: Png = None,
) -> None:
    """Draw a result file again.

    Example: sere-ray loadtest report ab.json --html ab.html
    """
    with user_errors():
        from sere_ray.loadtest.report import write_reports
        from sere_ray.util.results import load_result

        write_reports(load_result(result), html_file=html, csv_file=csv, png=png)


@app.command()
def workload(
    out: Out,
    kind: Annotated[
        Literal["text", "arithmetic"], typer.Option(help="Made-up text, or the demo's problems.")
    ] = "text",
    requests: Annotated[int, typer.Option(min=1, help="How many (text).")] = 200,
    prompt_words: Annotated[str, typer.Option(help="Least,most (text).")] = "20,120",
    output_tokens: Annotated[str, typer.Option(help="Least,most (text).")] = "32,96",
    seed: Seed = 0,
) -> None:
    """Write a workload file; the same for the same seed.

    Example: sere-ray loadtest workload --out text.jsonl --prompt-words 100,400 --seed 7
    """
    with user_errors():
        from sere_ray.loadtest.options import word_range
        from sere_ray.loadtest.workload import arithmetic_workload, text_workload, to_lines
        from sere_ray.util.files import atomic_path

        if kind == "arithmetic":
            entries = arithmetic_workload()
        else:
            entries = text_workload(
                requests=requests,
                prompt_words=word_range("--prompt-words", prompt_words),
                output_tokens=word_range("--output-tokens", output_tokens),
                seed=seed,
            )
        with atomic_path(out) as temporary:
            temporary.write_text(to_lines(entries))
    print(out)
