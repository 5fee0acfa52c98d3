"""OpenAI servers in processes of their own: `sere-ray serve`, or bare vLLM."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from sere_ray.serve.deployment_file import IMPORT_PATH
from sere_ray.util.errors import SereError

APP = "app"
"""Name of the Serve application."""
START_SECONDS = 900.0
"""How long a server may take to start. A large model that is compiled for the first time on a GPU
takes minutes."""
DRAIN_SECONDS = 90.0


def write_deployment(folder: Path, port: int, arguments: Mapping[str, Any]) -> Path:
    """A deployment file with one application."""
    application = {"name": APP, "import_path": IMPORT_PATH, "args": dict(arguments)}
    http = {"host": "127.0.0.1", "port": port}
    file = folder / "deployment.yaml"
    file.write_text(yaml.safe_dump({"http_options": http, "applications": [application]}))
    return file


@contextmanager
def served(
    folder: Path,
    port: int,
    arguments: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    metrics_port: int | None = None,
    *,
    proxy: str | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `sere-ray serve` in a process of its own until the block ends; yields once it serves.

    Args:
        folder: gets the deployment file and the log.
        port: of its HTTP side.
        arguments: ``args`` of the application, fields of ``ServeConfig``.
        environment: variables beside those of this process.
        metrics_port: where it exports metrics; None = a port that Ray chooses.
        proxy: ``direct`` or ``default``, as `sere-ray serve` takes it; None = its own choice.

    Raises:
        SereError: it ends, or is not up in time; with the end of the log.
    """
    file = write_deployment(folder, port, arguments)
    command = ["-m", "sere_ray", "serve", "--config", str(file)]
    if proxy is not None:
        command += ["--proxy", proxy]
    if metrics_port is not None:
        command += ["--metrics-port", str(metrics_port)]
    log = folder / "log"

    def is_up() -> bool:
        return f"serving {APP} on" in log.read_text()

    with server(command, log, is_up, environment) as process:
        yield process


@contextmanager
def server(
    arguments: list[str],
    log: Path,
    is_up: Callable[[], bool],
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python with ``arguments`` until the block ends; yields once ``is_up``.

    Args:
        arguments: what follows ``python``.
        log: file for what it prints.
        is_up: whether it serves.
        environment: variables beside those of this process.

    Raises:
        SereError: it ends, or is not up in time; with the end of the log.
    """
    # Tests of engines set this for their own process.
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, **(environment or {})},
            start_new_session=True,
        )
    try:
        _wait(process, is_up, log)
        yield process
    finally:
        stop(process)


def _wait(process: subprocess.Popen[bytes], is_up: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_up():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SereError(f"the server does not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.5)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and whatever it left."""
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(DRAIN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
