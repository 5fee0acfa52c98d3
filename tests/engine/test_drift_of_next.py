"""The drift tests against the vLLM after the installed one.

What runs is that version's Python with the compiled CPU kernels of the installed one: there is no
CPU build of it, and the drift tests only read.
"""

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]
PIN = ROOT / "tests" / "data" / "next-vllm.txt"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder that holds the package `vllm` of the next version."""
    folder = tmp_path_factory.mktemp("next")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*download, "-d", folder, "-r", PIN], check=True, timeout=600)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if not is_binary(name)])
    wheel.unlink()
    installed = Path(find_spec("vllm").origin).parent
    for kernels in installed.glob("*.so"):
        (folder / "vllm" / kernels.name).symlink_to(kernels)
    # A version for GPUs imports this one whatever the processor: let it be one that runs on it.
    runs = "AVX512" if torch.cpu._is_avx512_supported() else "AVX2"
    (folder / "vllm" / "_C.abi3.so").unlink()
    (folder / "vllm" / "_C.abi3.so").symlink_to(installed / f"_C_{runs}.abi3.so")
    return folder


def is_binary(name):
    return not name.startswith("vllm/") or name.endswith((".so", ".cubin", ".bin"))


def run(sources, *command):
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, *command],
        check=False,
        cwd=ROOT,
        env={**outer, "PYTHONPATH": str(sources)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_what_patches_count_on_is_there(sources):
    version = run(sources, "-c", "import vllm; print(vllm.__version__)").stdout.split()[-1]
    assert f"vllm=={version}" in PIN.read_text()
    drift = run(
        sources, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engine/test_drift.py"
    )
    assert drift.returncode == 0, drift.stdout
