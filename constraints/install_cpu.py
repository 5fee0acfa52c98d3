"""Install the pinned CPU stack into the environment that runs this; `make install` calls it.

Torch alone comes from PyTorch's index, unless pip finds its CPU build without, and everything else
from pip's own: no package can come from either. An index is asked first, with a time limit, so that
one that does not answer is an error and not hours of retries.

The pins are the whole closure, so nothing is resolved. Without CPU builds of torchvision,
torchaudio and torchcodec vLLM does not start, and it does not need them: they are left out.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

PINS = Path(__file__).with_name("cpu.txt")
PYTORCH = "https://download.pytorch.org/whl/cpu"
SECONDS = 50.0
"""How long an index may take to say what it has."""
_PATIENCE = ("--retries", "1", "--timeout", "15")
Pip = Callable[..., "subprocess.CompletedProcess[str]"]


def pip(*arguments: str, seconds: float | None = None) -> "subprocess.CompletedProcess[str]":
    """Run pip; a call that is cut off after ``seconds`` looks like one that failed."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {seconds:.0f} s")


def has(pin: str, index: list[str], run: Pip) -> tuple[bool, str]:
    """Whether an index has a pin for this Python, and pip's last words."""
    name, _, version = pin.partition("==")
    done = run("index", "versions", name, *_PATIENCE, *index, seconds=SECONDS)
    offered = done.stdout.partition("Available versions:")[2].partition("\n")[0]
    is_there = version in [each.strip() for each in offered.split(",")]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return is_there, lines[-1] if lines else "it answers, but has other versions only"


def refuse(index: str, variable: str, pin: str, words: str) -> None:
    """End with one line that names the index and the variable."""
    python = ".".join(map(str, sys.version_info[:2]))
    sys.exit(
        f"error: {index} gives no {pin} for Python {python}, or is not reached within "
        f"{SECONDS:.0f} s ({words}); set {variable} to an index that has it"
    )


def install(torch_index: str, run: Pip = pip) -> None:
    """Install all pins.

    Args:
        torch_index: where torch comes from; ``auto`` = PyTorch's index unless pip's own has it,
            nothing = pip's own.
        run: calls pip.

    Raises:
        SystemExit: an index is not reached or lacks a build, or pip fails.
    """
    pins = [line for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    pip_pin, torch_pin = (next(p for p in pins if p.startswith(f"{n}==")) for n in ("pip", "torch"))
    own = os.environ.get("PIP_INDEX_URL", "pip's index")
    found, words = has(pip_pin, [], run)
    if not found:
        refuse(own, "PIP_INDEX_URL", pip_pin, words)
    index: list[str] = []
    if torch_index == "auto":
        torch_index = "" if has(torch_pin, [], run)[0] else PYTORCH
    if torch_index:
        index = ["--index-url", torch_index]
        found, words = has(torch_pin, index, run)
        if not found:
            refuse(torch_index, "TORCH_INDEX (make install TORCH_INDEX=URL)", torch_pin, words)
    others = [pin for pin in pins if pin not in (pip_pin, torch_pin)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pins.txt"
        file.write_text("\n".join(others))
        for wanted in ([pip_pin], [*index, torch_pin], ["-r", str(file)]):
            done = run("install", "-q", "--no-deps", *_PATIENCE, *wanted)
            if done.returncode:
                sys.exit(f"error: pip install {' '.join(wanted)}:\n{done.stderr.strip()}")


if __name__ == "__main__":
    try:
        install(os.environ.get("TORCH_INDEX", "auto"))
    except KeyboardInterrupt:
        sys.exit(130)
