"""The commands around a deployment: serve, policy, stats, key, bench chaos, differential and
serving-overhead."""

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from sere_ray.cli.common import DEFAULT_URL, Out, console, numbers, saver, user_errors
from sere_ray.util.errors import SereError

Url = Annotated[str, typer.Option(help="Of the deployment; the token is in SERE_ADMIN_TOKEN.")]
policy_app = typer.Typer(no_args_is_help=True, help="Read or change the policy of a deployment.")


class Proxy(StrEnum):
    """Ways through Ray Serve."""

    DEFAULT = "default"
    DIRECT = "direct"


def serve(
    config: Annotated[Path, typer.Option(help="A file such as deploy/demo-cpu.yaml.")],
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port for Prometheus; Ray opens it on all interfaces."),
    ] = None,
    proxy: Annotated[
        Proxy | None,
        typer.Option(
            help="direct: HAProxy before the engines' own servers; default: Ray's proxy, much "
            "slower under load. [direct, where HAProxy is installed]"
        ),
    ] = None,
) -> None:
    """Run a deployment on this machine until Ctrl-C or SIGTERM; then requests under way finish.

    On a Ray cluster use `serve deploy FILE` instead: the file is the same.

    Example: sere-ray serve --config deploy/demo-cpu.yaml
    """
    with user_errors():
        from sere_ray.serve.run import run_file

        run_file(config, console, metrics_port, proxy=proxy)


def key(name: Annotated[str, typer.Argument(help="Who will hold it.")]) -> None:
    """Draw an API key or admin token: prints it, and the line for `access.keys_file`.

    Example: sere-ray key team-a
    """
    from sere_ray.serve.gateway.keys import NAME_PATTERN, digest, new_key

    with user_errors():
        if re.fullmatch(NAME_PATTERN, name) is None:
            raise SereError(f"NAME = {name!r}: must be 1 to 64 letters, digits, '.', '_' or '-'")
    value = new_key()
    console.print("Give this to its holder; it is not stored anywhere:", highlight=False)
    print(value)
    console.print("Add this to the key file, below `keys:` or `admin:`:", highlight=False)
    print(f'  - {{name: "{name}", sha256: "{digest(value)}"}}')


@policy_app.command("get")
def policy_get(url: Url = DEFAULT_URL) -> None:
    """Print the policy, its version, and how many replicas run it, as JSON.

    Example: sere-ray policy get
    """
    with user_errors():
        from sere_ray.serve.client import request

        print(json.dumps(request(url, "policy"), indent=2))


@policy_app.command("set")
def policy_set(
    changes: Annotated[
        list[str] | None, typer.Argument(help="KEY=VALUE ..., of the policy's keys.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="A whole policy, YAML, as tune writes; its artifact stays as it is."),
    ] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Change keys of the policy without a restart, on all replicas.

    Example: sere-ray policy set select_top_k=1 threshold=0.3 mode=on
    """
    with user_errors():
        from sere_ray.serve.client import is_followed, parse_changes, read_policy, request

        if bool(changes) == (file is not None):
            raise SereError("give KEY=VALUE ... or --file FILE, one of the two")
        change = parse_changes(changes or []) if file is None else read_policy(file)
        status = request(url, "policy", change=change)
        print(json.dumps(status, indent=2))
        if not is_followed(status):
            console.print(
                f"{status['replicas_settled']} of {status['replicas']} ranks run it yet; others "
                "follow when they answer: see `sere-ray policy get`",
                highlight=False,
            )


def stats(
    url: Url = DEFAULT_URL,
    watch: Annotated[
        float | None, typer.Option(min=0.5, help="Seconds: print what happened in each interval.")
    ] = None,
) -> None:
    """Print what re-routing does: experts read, slots re-routed, step time.

    Example: sere-ray stats --watch 2
    """
    with user_errors():
        from sere_ray.serve.client import print_stats

        print_stats(url, watch)


def chaos(
    out: Out,
    kills: Annotated[int, typer.Option(min=1, help="Every third is the policy actor.")] = 20,
    streams: Annotated[int, typer.Option(min=1, max=64, help="Clients at a time.")] = 8,
) -> None:
    """Kill ranks and policy actor of two gangs under load, and count what clients see.

    The engines are stand-ins that answer at once; everything else is the deployment. The file is
    written after each kill.

    Example: sere-ray bench chaos --out chaos.json
    """
    with user_errors():
        from sere_ray.bench.chaos import run_chaos

        run_chaos(kills, streams=streams, save=saver(out), console=console)
    print(out)


def restart(
    out: Out,
    kills: Annotated[int, typer.Option(min=1, help="Of each arm.")] = 3,
    ranks: Annotated[int, typer.Option(min=1, max=8, help="Of the gang; on GPUs one each.")] = 2,
    eager: Annotated[bool, typer.Option(help="Do not compile vLLM's graph.")] = False,
    proxy: Annotated[list[Proxy] | None, typer.Option(help="Way; repeatable [direct].")] = None,
) -> None:
    """Seconds until a gang serves, and until it answers again after an engine was killed.

    On a CPU with engines that are forked, and started anew, in turn. The file is written after
    each kill.

    Example: sere-ray bench restart --out restart.json
    """
    with user_errors():
        from sere_ray.bench.restart import run_restart

        run_restart(
            kills,
            ranks=ranks,
            compiled=not eager,
            proxies=[each.value for each in proxy or [Proxy.DIRECT]],
            save=saver(out),
            console=console,
        )
    print(out)


def differential(
    out: Out,
    generated: Annotated[int, typer.Option(min=4, help="Requests of each generated kind.")] = 80,
) -> None:
    """Compare status, form and fields of answers with those of vLLM's own server.

    The same requests go to vLLM with the demo model and to deployments on both ways: examples,
    schemathesis on vLLM's document, hypothesis. Needs the packages of the extra `dev`.

    Example: sere-ray bench differential --out docs/results/differential.json
    """
    with user_errors():
        from sere_ray.bench.differential_servers import run_differential

        run_differential(generated, save=saver(out), console=console)
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

        run_serving_overhead(
            model,
            concurrencies=numbers("--concurrency", concurrency, range(1, 257)),
            repeats=repeats,
            tokens=tokens,
            proxies=[name for name in PROXIES if name in (proxy or PROXIES)],
            compiled=not eager,
            save=saver(out),
            console=console,
        )
    print(out)
