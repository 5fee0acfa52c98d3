"""The commands around monitoring: dashboards, monitor-demo, what metrics and scores cost."""

import os
from pathlib import Path
from typing import Annotated

import typer

from sere_ray.cli.common import Out, console, saver, user_errors
from sere_ray.observe.rules import RANK_HOUR_PRICE
from sere_ray.util.errors import SereError

dashboards_app = typer.Typer(no_args_is_help=True, help="Rules, dashboards: files, or a Grafana.")
GrafanaUrl = Annotated[str, typer.Option("--url", help="Of Grafana's root.")]
TokenVariable = Annotated[
    str, typer.Option("--token-from-env", help="Environment variable that holds the token.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would change.")]
GRAFANA_URL, GRAFANA_TOKEN = "http://127.0.0.1:3000", "GRAFANA_TOKEN"


@dashboards_app.command()
def render(
    folder: Annotated[Path, typer.Argument(help="Such as deploy: gets prometheus/ and grafana/.")],
    rank_hour_price: Annotated[
        float, typer.Option(min=0, help="US dollars for a rank and hour, for the cost rules.")
    ] = RANK_HOUR_PRICE,
) -> None:
    """Write recording rules, alert rules and dashboards as files.

    Example: sere-ray dashboards render deploy --rank-hour-price 2.5
    """
    with user_errors():
        from sere_ray.observe.render import write

        for path in write(folder, rank_hour_price):
            print(path)


@dashboards_app.command()
def push(
    url: GrafanaUrl = GRAFANA_URL,
    token_from_env: TokenVariable = GRAFANA_TOKEN,
    prometheus_url: Annotated[
        str, typer.Option(help="Where Grafana finds Prometheus.")
    ] = "http://127.0.0.1:9090",
    deployment: Annotated[
        str | None, typer.Option(help="URL of a deployment whose policy changes are marked, too.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Bring a Grafana to folder, data source, dashboard and alert rules as defined here.

    A second push changes nothing. With --deployment the audit log (token in SERE_ADMIN_TOKEN)
    becomes annotations.

    Example: GRAFANA_TOKEN=... sere-ray dashboards push --url http://grafana:3000 --dry-run
    """
    with user_errors():
        from sere_ray.observe.grafana_push import Grafana, policy_marks
        from sere_ray.serve.client import request

        grafana = Grafana(url, _token(token_from_env), report=print, dry_run=dry_run)
        grafana.push(prometheus_url)
        if deployment is not None:
            grafana.annotate(policy_marks(request(deployment, "audit")["entries"]))


@dashboards_app.command()
def annotate(
    text: Annotated[str, typer.Argument(help="Such as the load test's name.")],
    start: Annotated[str, typer.Option(help="ISO 8601 with zone: 2026-01-31T12:00:00Z.")],
    end: Annotated[str, typer.Option(help="ISO 8601 with zone; not before the start.")],
    url: GrafanaUrl = GRAFANA_URL,
    token_from_env: TokenVariable = GRAFANA_TOKEN,
    dry_run: DryRun = False,
) -> None:
    """Mark the time span of a load test in the dashboard, once.

    Example: sere-ray dashboards annotate "steady 16" --start 2026-01-31T12:00:00Z
    --end 2026-01-31T12:10:00Z
    """
    with user_errors():
        from sere_ray.observe.grafana_push import LOAD_TEST_TAGS, Grafana, Mark, milliseconds

        mark = Mark(text, LOAD_TEST_TAGS, milliseconds(start), milliseconds(end))
        if mark.end < mark.start:
            raise SereError(f"--end = {end!r}: is before --start = {start!r}")
        Grafana(url, _token(token_from_env), report=print, dry_run=dry_run).annotate([mark])


def monitor_demo(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the endpoint.")] = 8000,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Of the metrics.")] = 8080,
    prometheus_port: Annotated[int, typer.Option(min=1, max=65535, help="Of Prometheus.")] = 9090,
) -> None:
    """Serve the demo model with load and a Prometheus beside it, until Ctrl-C.

    Example: sere-ray monitor-demo --port 8000 --prometheus-port 9090
    """
    with user_errors():
        from sere_ray.demo.monitor import run_monitor_demo

        run_monitor_demo(port, metrics_port, prometheus_port, console)


def metrics_overhead(
    out: Out,
    repeats: Annotated[int, typer.Option(min=1, help="Of every interval, interleaved.")] = 7,
    seconds: Annotated[float, typer.Option(min=1, help="Of decoding in a repeat.")] = 6.0,
) -> None:
    """What reading the counters for metrics costs: the demo model on CPU, with and without.

    Example: sere-ray bench metrics-overhead --out metrics-overhead.json
    """
    with user_errors():
        from sere_ray.bench.metrics_overhead import run_overhead

        run_overhead(
            saver(out),
            repeats=repeats,
            seconds=seconds,
            console=console,
        )
    print(out)


def production_score(
    out: Out,
    batches: Annotated[int, typer.Option(min=1, help="Of 16 scored answers, by policy.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Of every share, interleaved.")] = 7,
    answers: Annotated[int, typer.Option(min=1, help="Of each stream in a repeat.")] = 12,
) -> None:
    """What scores of answers say and cost: the demo model on CPU, beside the evaluator.

    Example: sere-ray bench production-score --out production-score-demo.json
    """
    with user_errors():
        from sere_ray.bench.production_score import run_production_score

        run_production_score(
            saver(out), batches=batches, repeats=repeats, answers=answers, console=console
        )
    print(out)


def _token(variable: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise SereError(
            f"{variable} is not set: put a token of a Grafana service account there, or name "
            "another variable with --token-from-env"
        )
    return value
