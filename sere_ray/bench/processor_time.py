"""Whose processor time a benchmark of servers takes: engine, front end, proxies, client."""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from sere_ray.bench.servers import APP
from sere_ray.util.processes import processes

PROCESSES = {
    "VLLM::": "engine",
    f"ray::ServeReplica:{APP}:SereIngress": "ingress",
    f"ray::ServeReplica:{APP}": "front end",
    "ray::ProxyActor": "proxy",
    "haproxy": "proxy",
    "ray::": "ray",
}
"""Whose processor time is told apart: how the name of a process starts. The first one counts."""


def processor_seconds(root: psutil.Process) -> dict[tuple[int, str], float]:
    """Processor seconds that the client and each of the server's processes have used so far.

    Args:
        root: the process below which the server's are.

    Returns:
        Seconds by process id and kind of process.
    """
    seconds = {}
    client = ("client", psutil.Process())
    server = ((_kind(title, process, root), process) for title, process in processes(root))
    for kind, process in (client, *server):
        with suppress(psutil.Error):
            times = process.cpu_times()
            seconds[process.pid, kind] = times.user + times.system
    return seconds


def _kind(title: str, process: psutil.Process, root: psutil.Process) -> str:
    for start, kind in PROCESSES.items():
        if title.startswith(start) or Path(title).name.startswith(start):
            return kind
    return "front end" if process == root else "ray"


def cores_used(
    before: Mapping[tuple[int, str], float], after: Mapping[tuple[int, str], float], seconds: float
) -> dict[str, float]:
    """Processor seconds a second by kind, between two readings ``seconds`` apart."""
    sums: dict[str, float] = defaultdict(float)
    for (pid, kind), used in after.items():
        sums[kind] += (used - before.get((pid, kind), used)) / seconds
    return {kind: round(cores, 3) for kind, cores in sorted(sums.items())}
