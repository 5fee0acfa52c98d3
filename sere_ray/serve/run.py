"""``sere-ray serve``: a deployment file on a Ray instance of its own, until a signal."""

import logging
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from sere_ray.serve import way
from sere_ray.serve.app import check_vllm_of_ray
from sere_ray.serve.config import ServeConfig
from sere_ray.serve.deployment_file import check_artifacts, configs, limits_of_proxies, load_file
from sere_ray.serve.engine_check import check_engine, check_model
from sere_ray.serve.failed_start import failure, reason
from sere_ray.serve.imports import imported_beside
from sere_ray.util.errors import SereError
from sere_ray.util.http import address
from sere_ray.util.ports import check_free
from sere_ray.util.progress import waiting
from sere_ray.util.ray_instance import nothing_left, session_logs, start_ray

SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 0.5


def run_file(
    path: Path, console: Console, metrics_port: int | None = None, *, proxy: str | None = None
) -> None:
    """Serve the applications of a file until SIGINT or SIGTERM; then drain and end Ray.

    Args:
        path: of the deployment file.
        console: where progress goes.
        metrics_port: where Prometheus finds the metrics; None = a port that Ray chooses.
        proxy: ``direct``: HAProxy and the engines' own HTTP servers; ``default``: Ray's proxy and
            an ingress; None = the first, where HAProxy is installed.

    Raises:
        SereError: the file is not valid, an artifact or model is not there, vLLM refuses the
            arguments of an engine, the port is taken, or an engine does not start.
    """
    chosen = way.choose(proxy)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    end_at_signals()
    try:
        with ExitStack() as stack:
            stack.enter_context(way.switched(chosen))
            document = load_file(path)
            served = configs(document)
            http = check(path, document, served, metrics_port)
            if chosen != way.DIRECT and proxy is None:
                console.print("HAProxy is not installed: Ray's proxy serves, which is slower")
            reads = any(config.request_router == "experts" for config in served)
            limits = limits_of_proxies(path, served)
            stack.enter_context(way.prepared(chosen, limits, shows_bodies=reads))
            stack.enter_context(nothing_left())
            with imported_beside():
                start_ray(metrics_port=metrics_port)
                end_at_signals()  # Ray has set handlers of its own
                start_serve(http)
            for config in served:
                check_engine(config)
            names = deploy_all(document, console)
            if metrics_port is not None:
                metrics = f"http://127.0.0.1:{metrics_port}/metrics"
                console.print(f"metrics on {metrics}", highlight=False)
            url = f"http://{address(http['host'], http['port'])}"
            console.print(f"serving {', '.join(names)} on {url}", highlight=False)
            wait_for_signal()
            console.print("draining: requests under way finish, new ones are refused")
            drain(names)
    except (KeyboardInterrupt, SystemExit):  # the second of Ray's own handler, while it starts
        console.print("stopped while starting")
    finally:
        logging.disable(logging.NOTSET)
        _set_handlers(before)


def check(
    path: Path,
    document: Mapping[str, Any],
    served: Sequence[ServeConfig],
    metrics_port: int | None,
) -> dict[str, Any]:
    """All that can be known without vLLM, which takes longest to import; the quick things first.

    Args:
        path: of the deployment file.
        document: what it says.
        served: what its applications serve.
        metrics_port: where Prometheus finds the metrics; None = a port that Ray chooses.

    Returns:
        Ray's ``http_options``.

    Raises:
        SereError: something cannot work.
    """
    check_vllm_of_ray()
    for config in served:
        check_model(config)
    check_artifacts(served)
    limits = limits_of_proxies(path, served)
    http = {
        "host": "127.0.0.1",
        "port": 8000,
        **(document.get("http_options") or {}),
        "keep_alive_timeout_s": limits.idle_s,
    }
    # Ray would share it with others.
    check_free(http["port"], f"{path}: http_options.port", host=http["host"])
    if metrics_port is not None:
        check_free(metrics_port, "--metrics-port", host="")
    logging.disable(logging.INFO)  # vLLM and Ray log here as they are imported
    return http


def start_serve(http: dict[str, Any]) -> None:
    """Start Serve's controller and proxy.

    Raises:
        SereError: they do not start; with the reason.
    """
    from ray import serve

    try:
        serve.start(http_options=http)
    except Exception as error:
        raise _not_started("the HTTP proxy", str(error)) from None


def deploy_all(document: Mapping[str, Any], console: Console) -> list[str]:
    """Start all applications; returns their names.

    Raises:
        SereError: one does not start; with the reason.
    """
    from sere_ray.serve import build_app

    names = []
    for application in document["applications"]:
        names.append(application.get("name", "default"))
        with waiting(console, f"starting {names[-1]}"):
            deploy(
                build_app(application["args"]),
                names[-1],
                application.get("route_prefix", "/"),
            )
    return names


def deploy(application: Any, name: str, route_prefix: str | None) -> None:
    """Start an application, and end the try where its first replica fails.

    Serve would try three times a replica, and take its message for the reason.

    Raises:
        SereError: it does not start; with the engine's reason and the place of the logs.
    """
    from ray import serve
    from ray.serve import RunTarget
    from ray.serve.context import _get_global_client

    try:
        # It does not wait itself: a thread that does is still at it while Ray ends.
        serve.run_many(
            [RunTarget(application, name=name, route_prefix=route_prefix)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        _wait_until_running(name)
        # That the proxies know of it, too, only Serve's own client can ask.
        _get_global_client().wait_for_proxies_serving()
    except SereError:
        raise
    except Exception as error:
        raise _not_started(name, str(error)) from None


def _wait_until_running(name: str) -> None:
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    status = serve.status()
    while status.applications[name].status != ApplicationStatus.RUNNING:
        message = failure(status, name)
        if message is not None:
            raise _not_started(name, message)
        time.sleep(POLL_SECONDS)
        status = serve.status()


def _not_started(name: str, message: str) -> SereError:
    logs = session_logs()
    return SereError(f"{name} does not start: {reason(message, logs)} (logs: {logs})")


def drain(names: list[str]) -> None:
    """Delete applications: requests under way finish first."""
    from ray import serve

    for name in names:
        serve.delete(name)


def end_at_signals() -> None:
    """Have SIGINT and SIGTERM raise ``KeyboardInterrupt``: a start ends, and cleans up."""

    def end(*_: object) -> None:
        _set_handlers(dict.fromkeys(SIGNALS, signal.SIG_IGN))  # one is enough: we clean up
        raise KeyboardInterrupt

    _set_handlers(dict.fromkeys(SIGNALS, end))


def _set_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def wait_for_signal() -> None:
    """Return at SIGINT or SIGTERM, also in a process that was started with SIGINT ignored.

    Call it once Ray runs: Ray sets handlers of its own while it starts.
    """
    stop = threading.Event()
    for number in SIGNALS:
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(1.0):
        pass
