"""Commands that measure deployments: bench chaos, serving-overhead."""

from enum import StrEnum
from typing import Annotated, Literal

import typer

from sere_ray.cli.common import Out, console, numbers, user_errors


class Proxy(StrEnum):
    """Ways through Ray Serve."""

    DEFAULT = "default"
    DIRECT = "direct"


def chaos(
    out: Out,
    kills: Annotated[int, typer.Option(min=1, help="Every third is the router actor.")] = 20,
    streams: Annotated[int, typer.Option(min=1, max=64, help="Clients at a time.")] = 8,
) -> None:
    """Kill ranks and router actor of two gangs under load, and count what clients see.

    The engines are stand-ins that answer at once; everything else is the deployment. The file is
    written after each kill.

    Example: sere-ray bench chaos --out chaos.json
    """
    with user_errors():
        from sere_ray.bench.chaos import run_chaos
        from sere_ray.util.results import write_result

        run_chaos(
            kills, streams=streams, save=lambda rows: write_result(out, rows), console=console
        )
    print(out)


def serving_overhead(
    out: Out,
    model: Annotated[
        Literal["demo", "qwen3-30b-a3b", "qwen1.5-moe-a2.7b", "deepseek-v2-lite"],
        typer.Option(help="Shapes; all but the demo's need a GPU."),
    ] = "demo",
    concurrency: Annotated[
        str, typer.Option(help="Requests in flight, up to 256, comma-separated.")
    ] = "1,32,64",
    proxy: Annotated[
        list[Proxy] | None,
        typer.Option(help="Ray's proxy and ingress, HAProxy to the engine; repeat it [both]."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Starts of each server, in turns.")] = 3,
    tokens: Annotated[int, typer.Option(min=2, max=512, help="Output tokens of a request.")] = 64,
    eager: Annotated[bool, typer.Option("--eager", help="Without vLLM's compiled graph.")] = False,
) -> None:
    """Time to first token and throughput of a deployment against the bare vLLM server.

    Each server is up alone; streams, the same requests. The file is written after each round.

    Example: sere-ray bench serving-overhead --out serving-overhead.json
    """
    with user_errors():
        from sere_ray.bench.serving_overhead import PROXIES, run_serving_overhead
        from sere_ray.util.results import write_result

        run_serving_overhead(
            model,
            concurrencies=numbers("--concurrency", concurrency, range(1, 257)),
            repeats=repeats,
            tokens=tokens,
            proxies=[name for name in PROXIES if name in (proxy or PROXIES)],
            compiled=not eager,
            save=lambda rows: write_result(out, rows),
            console=console,
        )
    print(out)
