"""Load tests of the demo model: policies compared, and a soak with disturbances."""

from typing import Annotated

import typer

from sere_ray.cli.common import DEFAULT_URL, Out, console, saver, user_errors
from sere_ray.cli.loadtest_common import (
    Csv,
    Html,
    Keys,
    MaxLag,
    Png,
    Policies,
    Rounds,
    Stall,
    Url,
    finish,
)


def demo(
    out: Out,
    rates: Annotated[
        str, typer.Option(help="Sweep over requests per second, such as 2,5,8 [8 streams].")
    ] = "",
    policies: Policies = "off,S=2,S=1",
    rounds: Rounds = 4,
    usd_per_gpu_hour: Annotated[
        float, typer.Option(help="What an hour of this machine costs: an assumption.")
    ] = 0.1,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8000,
    max_lag_ms: MaxLag = 50,
    html: Html = None,
    csv: Csv = None,
    png: Png = None,
) -> None:
    """Serve the demo model on CPU, in two ranks, and compare policies through HTTP.

    Two minutes of load and one or two for the start. `make loadtest` runs it.

    Example: sere-ray loadtest demo --out ab.json --html ab.html
    """
    with user_errors():
        from sere_ray.demo.loadtest import run_demo_comparison
        from sere_ray.loadtest.options import positive
        from sere_ray.loadtest.slo import Price

        content = run_demo_comparison(
            saver(out),
            policies=policies,
            price=Price(usd_per_gpu_hour),
            port=port,
            rates=positive("--rates", rates) if rates else [],
            rounds=rounds,
            console=console,
        )
        finish(content, out, html, csv, png, max_lag_ms, None)


def soak(
    out: Out,
    pid: Annotated[int, typer.Option(help="Of `sere-ray serve` on this machine.")],
    minutes: Annotated[float, typer.Option(min=0.2, help="How long.")] = 30,
    kill_rank: Annotated[bool, typer.Option(help="Kill an engine after half of the time.")] = True,
    url: Url = DEFAULT_URL,
    keys: Keys = None,
    stall: Stall = 30,
) -> None:
    """Load the demo model's deployment and disturb it: is anything lost, crossed, or growing?

    Policies change, clients hang up, requests are nonsense, an engine is killed. The admin token is
    in SERE_ADMIN_TOKEN.

    Example: sere-ray loadtest soak --pid 4711 --minutes 30 --out soak.json
    """
    with user_errors():
        from dataclasses import replace

        from sere_ray.loadtest.options import make_plan
        from sere_ray.loadtest.soak import run_soak

        plan = make_plan(url, keys_file=keys, stall=stall)
        run_soak(
            replace(plan, seconds=60 * minutes),
            url=url,
            pid=pid,
            kill_rank=kill_rank,
            save=saver(out),
            console=console,
        )
    print(out)
