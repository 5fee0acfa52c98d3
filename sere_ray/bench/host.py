"""All that is to run on one GPU host, by a plan: lanes side by side, results kept as they come.

A plan is a YAML file (``loadtest/hosts/``). A lane has GPUs of its own and runs its commands one
after the other. One that fails, or takes longer than it may, is noted, and the lane goes on. At the
end of the time all is ended; what was written until then stays.
"""

import os
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console

from sere_ray.util.errors import SereError
from sere_ray.util.files import atomic_path
from sere_ray.util.results import write_result

OUT = "{out}"
"""Stands for the folder of results in a command."""
LOOK_SECONDS = 5.0
STACKS_SECONDS = 10.0
STATE = "host.json"
_PROGRAMS = {
    "sere-ray": [sys.executable, "-m", "sere_ray"],
    "pytest": [sys.executable, "-m", "pytest"],
    "python": [sys.executable],
}


class Lane(BaseModel):
    """Commands that run one after the other on GPUs of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern="^[a-z0-9-]+$")
    gpus: tuple[int, ...] = Field(description="which the commands see; none = no GPU")
    commands: tuple[str, ...] = Field(min_length=1)
    minutes_each: float | None = Field(
        default=None, gt=0, description="a command that takes longer says where it is, and is ended"
    )


class Plan(BaseModel):
    """What runs on one host."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpus: int = Field(ge=0, le=16, description="that the host must have")
    environment: dict[str, str] = Field(default_factory=dict)
    lanes: tuple[Lane, ...] = Field(min_length=1)


def read_plan(path: Path) -> Plan:
    """Read a plan and check that no GPU is in two lanes.

    Raises:
        SereError: it is not valid; names the file and the key.
    """
    try:
        plan = Plan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise SereError(f"{path}: {' '.join(str(error).split())[:400]}") from None
    names = [lane.name for lane in plan.lanes]
    used = [gpu for lane in plan.lanes for gpu in lane.gpus]
    if len(set(names)) < len(names):
        raise SereError(f"{path}: lanes.name: two lanes have the same one")
    if len(set(used)) < len(used) or any(gpu >= plan.gpus for gpu in used):
        raise SereError(
            f"{path}: lanes.gpus: each of 0 to {plan.gpus - 1} at most once, here {used}"
        )
    return plan


def command_of(text: str, out: Path) -> list[str]:
    """The arguments of a command, with this Python and this folder of results.

    Raises:
        SereError: it is none of the programs that a plan may run.
    """
    program, *arguments = shlex.split(text)
    if program not in _PROGRAMS:
        raise SereError(f"{text!r}: starts with none of {', '.join(_PROGRAMS)}")
    return [*_PROGRAMS[program], *(each.replace(OUT, str(out)) for each in arguments)]


@dataclass
class _Host:
    """What has run so far."""

    plan: Plan
    out: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_over: threading.Event = field(default_factory=threading.Event)
    has_news: threading.Event = field(default_factory=threading.Event)

    def run_lane(self, lane: Lane) -> None:
        """Run its commands, until the time is over."""
        environment = {
            **os.environ,
            **self.plan.environment,
            "PYTHONFAULTHANDLER": "1",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, lane.gpus)),
        }
        for number, text in enumerate(lane.commands):
            if self.is_over.is_set():
                return
            log = self.out / f"{lane.name}-{number}.log"
            start = time.monotonic()
            code = self._run(command_of(text, self.out), log, environment, lane.minutes_each)
            seconds = round(time.monotonic() - start, 1)
            row = {"lane": lane.name, "command": text, "code": code, "seconds": seconds}
            with self.lock:
                self.rows.append(row)
                write_result(self.out / STATE, {"rows": self.rows})
            self.has_news.set()

    def _run(
        self, command: list[str], log: Path, environment: Mapping[str, str], minutes: float | None
    ) -> int | None:
        """The exit code; None = it was ended, at the end of its own time or of all."""
        with log.open("wb") as output:
            with self.lock:
                if self.is_over.is_set():
                    return None
                process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    start_new_session=True,
                )
                self.running.add(process)
            code = _wait(process, minutes)
            with self.lock:
                self.running.discard(process)
                return None if self.is_over.is_set() else code

    def end(self) -> None:
        """End whatever runs, with all that it has started."""
        with self.lock:
            self.is_over.set()
            for process in self.running:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a command with all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], minutes: float | None) -> int | None:
    """The exit code; None = it took too long, and was ended; its log has the stacks."""
    try:
        return process.wait(None if minutes is None else 60 * minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # Python's fault handler writes the stacks
        with suppress(subprocess.TimeoutExpired):
            process.wait(STACKS_SECONDS)
        _kill(process)
        process.wait()
        return None


def run_host(
    plan: Plan, out: Path, *, minutes: float, archive: Path | None, console: Console
) -> list[dict[str, Any]]:
    """Run a plan.

    Args:
        plan: of :func:`read_plan`.
        out: folder of results and logs; made if it is not there.
        minutes: after which whatever still runs is ended.
        archive: a ``.tgz`` of that folder, written anew every few seconds; None = none.
        console: where progress goes.

    Returns:
        A row for each command that was started, in the order of their ends.
    """
    out.mkdir(parents=True, exist_ok=True)
    host = _Host(plan, out)
    threads = [threading.Thread(target=host.run_lane, args=(lane,)) for lane in plan.lanes]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60 * minutes
    told = 0
    try:
        while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
            host.has_news.wait(min(LOOK_SECONDS, max(0.0, deadline - time.monotonic())))
            host.has_news.clear()
            for row in host.rows[told:]:
                ended = f"{row['lane']}: {row['code']} after {row['seconds']} s: {row['command']}"
                console.print(ended, highlight=False, soft_wrap=True)
                told += 1
            _pack(out, archive)
    finally:
        host.end()
        for thread in threads:
            thread.join()
        _pack(out, archive)
    return host.rows


def _pack(out: Path, archive: Path | None) -> None:
    """Write what there is now; a file that is just being replaced is in the next one."""
    if archive is None:
        return
    with atomic_path(archive) as path, tarfile.open(path, "w:gz") as packed:
        for file in sorted(out.rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                with suppress(FileNotFoundError):
                    packed.add(file, arcname=file.relative_to(out.parent))
