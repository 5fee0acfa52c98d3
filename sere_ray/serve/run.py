"""``sere-ray serve``: a deployment file on a Ray instance of its own, until a signal."""

import logging
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from sere_ray.serve.app import check_vllm_of_ray
from sere_ray.serve.config import ServeConfig
from sere_ray.serve.policy_actor.artifacts import read_artifact
from sere_ray.util import utf8_headers
from sere_ray.util.errors import SereError
from sere_ray.util.ports import check_free, free_ports
from sere_ray.util.progress import waiting
from sere_ray.util.ray_instance import start_ray

IMPORT_PATH = "sere_ray.serve:build_app"
APPLICATION_KEYS = ("name", "import_path", "args", "route_prefix")


def run_file(
    path: Path, console: Console, metrics_port: int | None = None, *, direct: bool = False
) -> None:
    """Serve the applications of a file until SIGINT or SIGTERM; then drain and end Ray.

    Args:
        path: of the deployment file.
        console: where progress goes.
        metrics_port: where Prometheus finds the metrics; None = a port that Ray chooses.
        direct: HAProxy and the engines' own HTTP servers instead of Ray's proxy and an ingress.

    Raises:
        SereError: the file is not valid, an artifact is not there, or the port is taken.
    """
    os.environ[utf8_headers.VARIABLE] = utf8_headers.CALLBACK
    if direct:
        stream_directly()
    document = load_file(path)
    check_vllm_of_ray()
    check_artifacts(document)
    http = {"host": "127.0.0.1", "port": 8000, **(document.get("http_options") or {})}
    host, port = http["host"], http["port"]
    check_free(port, f"{path}: http_options.port", host=host)  # Ray would share it with others
    if metrics_port is not None:
        check_free(metrics_port, "--metrics-port", host="")
    start_ray(metrics_port=metrics_port)
    import ray
    from ray import serve

    try:
        logging.disable(logging.INFO)  # vLLM and Ray log here as they are imported
        from sere_ray.serve import build_app

        serve.start(http_options=http)
        names = []
        for application in document["applications"]:
            names.append(application.get("name", "default"))
            with waiting(console, f"starting {names[-1]}"):
                serve.run(
                    build_app(application["args"]),
                    name=names[-1],
                    route_prefix=application.get("route_prefix", "/"),
                    blocking=False,
                )
        if metrics_port is not None:
            console.print(f"metrics on http://127.0.0.1:{metrics_port}/metrics", highlight=False)
        console.print(f"serving {', '.join(names)} on http://{host}:{port}", highlight=False)
        wait_for_signal()
        console.print("draining: requests under way finish, new ones are refused")
        for name in names:
            serve.delete(name)
    except KeyboardInterrupt:
        console.print("stopped while starting")
    finally:
        logging.disable(logging.NOTSET)
        ray.shutdown()  # the instance is ours alone: Serve ends with it


def stream_directly() -> None:
    """Have Ray put HAProxy before the engines' own HTTP servers. Call it before Ray is imported.

    HAProxy opens two more ports, for its state and its metrics. Ray's defaults are fixed numbers,
    so a second instance on a machine would not start: here the ports are free ones. Ray also keeps
    a replica that has no request left for 30 s, for load balancers to notice. There is none here,
    so it is 1 s.
    """
    os.environ |= {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    }
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")
    names = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")
    for name, port in zip(names, free_ports(2), strict=True):
        os.environ.setdefault(name, str(port))


def check_artifacts(document: Mapping[str, Any]) -> None:
    """Read the artifacts, since the policy actors of this instance of Ray will run here.

    Raises:
        SereError: one is missing, unreadable or too large.
    """
    for application in document["applications"]:
        config = ServeConfig.parse(application["args"])
        if config.sere is not None:
            read_artifact(config.sere.similarity_path, config.max_artifact_bytes)


def wait_for_signal() -> None:
    """Return at SIGINT or SIGTERM, also in a process that was started with SIGINT ignored.

    Call it once Ray runs: Ray sets handlers of its own while it starts.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(1.0):
        pass


def _refuse_others(path: Path, where: str, given: Mapping[str, Any], taken: Sequence[str]) -> None:
    for key in given:
        if key not in taken:
            raise SereError(
                f"{path}: {where}{key}: `sere-ray serve` takes only {', '.join(taken)} here; "
                "deploy the file with `serve deploy` on a Ray cluster, or leave the key out"
            )


def load_file(path: Path) -> dict[str, Any]:
    """A deployment file, with every application's arguments checked.

    Raises:
        SereError: not there, not YAML, or a mistake in it.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SereError(
            f"{path}: {error.strerror}; `sere-ray examples --out .` copies files to start from"
        ) from None
    except yaml.YAMLError as error:
        raise SereError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(document)
    except (ValidationError, TypeError) as error:
        raise SereError(f"{path}: not a Ray Serve file: {' '.join(str(error).split())}") from None
    _refuse_others(path, "", document, ("applications", "http_options"))
    for number, application in enumerate(document["applications"]):
        _refuse_others(path, f"applications.{number}.", application, APPLICATION_KEYS)
        if application["import_path"] != IMPORT_PATH:
            raise SereError(
                f"{path}: import_path = {application['import_path']!r}: `sere-ray serve` runs "
                f"{IMPORT_PATH}; use `serve run` for other applications"
            )
        ServeConfig.parse(application.get("args") or {})
    return dict(document)
