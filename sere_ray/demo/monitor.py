"""`make monitor-demo`: demo deployment, Prometheus and load on one machine."""

import tempfile
import threading
from pathlib import Path
from urllib.parse import urlencode

from rich.console import Console

from sere_ray import assets
from sere_ray.calibration import calibrate
from sere_ray.demo.run import check_machine
from sere_ray.demo.serving import HOST, MODEL_ID, send, served
from sere_ray.observe.prometheus import prometheus, require_prometheus
from sere_ray.policy.policy import Policy
from sere_ray.serve.run import wait_for_signal
from sere_ray.util.ports import check_free

STREAMS = 8
QUERY = '{__name__=~"sere:experts_(before|after):mean"}'
"""What the printed link shows."""
INTERVAL_SECONDS = 5.0


def run_monitor_demo(port: int, metrics_port: int, prometheus_port: int, console: Console) -> None:
    """Serve, watch and load until Ctrl-C.

    Raises:
        SereError: a port is taken or a package is missing.
    """
    require_prometheus()
    compiled = check_machine(port, console)
    check_free(metrics_port, "--metrics-port", host="")
    check_free(prometheus_port, "--prometheus-port")
    with tempfile.TemporaryDirectory(prefix="sere-monitor-") as name:
        folder = Path(name)
        similarity = folder / "demo.safetensors"
        calibrate(str(assets.MODEL), data=str(assets.CALIBRATION), out=similarity, console=console)
        policy = Policy.parse({"similarity": str(similarity), "select_top_k": 2})
        with (
            served(
                policy,
                port,
                max_streams=STREAMS,
                compiled=compiled,
                console=console,
                metrics_port=metrics_port,
            ),
            prometheus(folder, metrics_port, prometheus_port, INTERVAL_SECONDS) as server,
        ):
            stop = threading.Event()
            thread = threading.Thread(target=_load, args=(f"http://{HOST}:{port}/v1", stop))
            thread.start()
            try:
                console.print(
                    urls(port, metrics_port, server.url),
                    highlight=False,
                    markup=False,
                    soft_wrap=True,  # a wrapped link cannot be opened
                )
                wait_for_signal()
                console.print("stopping: requests under way finish")
            finally:
                stop.set()
                thread.join()


def urls(port: int, metrics_port: int, prometheus_url: str) -> str:
    """What to open, a line each."""
    graph = urlencode({"g0.expr": QUERY, "g0.tab": 0, "g0.range_input": "10m"})
    return "\n".join(
        [
            f"endpoint    http://{HOST}:{port}/v1",
            f"page        http://{HOST}:{port}/sere/ui",
            f"metrics     http://{HOST}:{metrics_port}/metrics",
            f"Prometheus  {prometheus_url}/graph?{graph}",
            f"alerts      {prometheus_url}/alerts",
            "Load runs until Ctrl-C; the first numbers come after half a minute. Try, elsewhere:",
            f"sere-ray policy set select_top_k=1 --url http://{HOST}:{port}",
        ]
    )


def _load(base_url: str, stop: threading.Event) -> None:
    """Arithmetic, a few problems at a time so that it ends soon after it is told to."""
    problems = assets.arithmetic()
    while not stop.is_set():
        problems = [*problems[STREAMS:], *problems[:STREAMS]]
        send(base_url, MODEL_ID, problems[:STREAMS], STREAMS)
