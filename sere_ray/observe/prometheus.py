"""A Prometheus server of our own on this machine: for `make monitor-demo` and the tests."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode

import yaml

from sere_ray.observe.alerts import alert_groups
from sere_ray.observe.rules import recording_groups
from sere_ray.util.errors import SereError
from sere_ray.util.http import open_url

HOST = "127.0.0.1"
START_SECONDS = 30.0


class Prometheus:
    """A running server.

    Args:
        url: of its root.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expr: str, at: float | None = None) -> list[dict[str, Any]]:
        """Series of an instant query: ``{"metric": labels, "value": [time, text]}``.

        Args:
            expr: PromQL.
            at: seconds since 1970; None is now.

        Raises:
            SereError: not valid PromQL.
        """
        moment = {} if at is None else {"time": at}
        result: list[dict[str, Any]] = self.get("query", query=expr, **moment)["result"]
        return result

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Series over time: ``{"metric": labels, "values": [[time, text], ...]}``."""
        answer = self.get("query_range", query=expr, start=start, end=end, step=step)
        result: list[dict[str, Any]] = answer["result"]
        return result

    def get(self, what: str, **parameters: Any) -> Any:
        """The field ``data`` of the HTTP API's answer.

        Raises:
            SereError: Prometheus refuses the question; with its words.
        """
        address = f"{self.url}/api/v1/{what}?{urlencode(parameters)}"
        try:
            with open_url(address, 30) as response:
                return json.load(response)["data"]
        except HTTPError as error:
            raise SereError(f"{address}: {json.load(error)['error']}") from None


def require_prometheus() -> str:
    """Path of the program ``prometheus``.

    Raises:
        SereError: it is not installed.
    """
    command = shutil.which("prometheus")
    if command is None:
        raise SereError("Prometheus is not installed; on Debian and Ubuntu: apt install prometheus")
    return command


@contextmanager
def prometheus(
    folder: Path, metrics_port: int, port: int, interval_s: float
) -> Iterator[Prometheus]:
    """Run Prometheus with our rules until the block ends.

    Args:
        folder: for its configuration and data.
        metrics_port: of Ray's metrics agent on this machine.
        port: of Prometheus' own HTTP side, on loopback.
        interval_s: between two scrapes, and between two evaluations of the rules.

    Raises:
        SereError: Prometheus is not installed or does not start.
    """
    command = require_prometheus()
    config = write_config(folder, metrics_port, interval_s)
    log = folder / "prometheus.log"
    options = [
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={HOST}:{port}",
    ]
    with log.open("w") as output:
        process = subprocess.Popen([command, *options], stdout=output, stderr=subprocess.STDOUT)
    try:
        server = Prometheus(f"http://{HOST}:{port}")
        _wait(server, process, log)
        yield server
    finally:
        process.terminate()
        process.wait()


def write_config(folder: Path, metrics_port: int, interval_s: float) -> Path:
    """Write configuration and rules; returns the path of the configuration.

    They are those of ``deploy/prometheus`` with other intervals and another target.
    """
    interval = f"{round(interval_s * 1000)}ms"
    target = {"job_name": "ray", "static_configs": [{"targets": [f"{HOST}:{metrics_port}"]}]}
    files = {
        "recording.yml": recording_groups(),
        "alerts.yml": alert_groups(),
        "prometheus.yml": {
            "global": {"scrape_interval": interval, "evaluation_interval": interval},
            "rule_files": ["recording.yml", "alerts.yml"],
            "scrape_configs": [target],
        },
    }
    for name, content in files.items():
        (folder / name).write_text(yaml.safe_dump(content))
    return folder / "prometheus.yml"


def _wait(server: Prometheus, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with open_url(f"{server.url}/-/ready", 5):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise SereError(f"Prometheus does not start: {log.read_text()[-500:]}")
