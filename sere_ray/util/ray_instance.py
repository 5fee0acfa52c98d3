"""A Ray instance of our own on this machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from sere_ray.util.errors import SereError
from sere_ray.util.processes import family
from sere_ray.util.temporary import leave_room_for_sockets

_NOT_STARTED = "timed out during startup"
"""Text of Ray's exception where a process of the instance has ended. It has no type of its own."""
_ATTEMPTS = 2
_END_SECONDS = 5.0


def start_ray(*, metrics_port: int | None = None, **options: Any) -> None:
    """Start a Ray instance of our own; one that already runs on this machine is left alone.

    Its metrics agent listens on all interfaces, as Ray's other ports do. If one of its processes
    does not start, for instance because the machine is busy for 15 s, Ray gives up after 30 s.
    Then it is started once more.

    Args:
        metrics_port: where Prometheus finds the metrics; None = a port that Ray chooses.
        options: further ones of ``ray.init``.

    Raises:
        SereError: it did not start twice, or no folder for its sockets has a short path.
    """
    leave_room_for_sockets()
    import ray

    for _ in range(_ATTEMPTS):
        before = psutil.Process().children(recursive=True)
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _metrics_export_port=metrics_port,
                **options,
            )
        except Exception as error:
            if _NOT_STARTED not in str(error):
                raise
            logs = _end_children(before)
        except BaseException:  # a signal: what has started would outlive this process
            _end_children(before)
            raise
        else:
            return
    port = "" if metrics_port is None else f", or something listens on port {metrics_port}"
    raise SereError(
        f"Ray did not start, {_ATTEMPTS} times: the machine is too busy{port}; the reason is in "
        f"{logs}: see dashboard_agent.log and raylet.out"
    )


@contextmanager
def nothing_left() -> Iterator[None]:
    """End Ray with the block, and every process of it that outlives it, of this one's family.

    An engine's process outlives its replica for a while, or for good where it hangs.
    """
    import ray

    before = family(psutil.Process())
    try:
        yield
    finally:
        below = [each for each in family(psutil.Process()) if each not in before]
        ray.shutdown()
        _, left = psutil.wait_procs(below, timeout=_END_SECONDS)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=_END_SECONDS)


def session_logs() -> Path:
    """The folder in which the processes of the running instance log."""
    import ray

    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(folder, "ray", str(ray.get_runtime_context().get_session_name()), "logs")


def _end_children(before: list[psutil.Process]) -> str:
    """End what a start has left, as Ray does only when this process ends; where its logs are."""
    left: list[psutil.Process] = []
    # Each is held first: a raylet that goes on would start agents behind our back.
    while new := [
        each
        for each in psutil.Process().children(recursive=True)
        if each not in before and each not in left
    ]:
        for process in new:
            with suppress(psutil.Error):
                process.suspend()
        left += new
    arguments = []
    for process in left:
        with suppress(psutil.Error):  # one that has ended has no arguments
            arguments += process.cmdline()
            process.kill()
    psutil.wait_procs(left, timeout=10)
    option = "--log_dir="
    folders = [each.removeprefix(option) for each in arguments if each.startswith(option)]
    return folders[0] if folders else "the folder logs of Ray's newest session"
