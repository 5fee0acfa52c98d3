"""Compile ``kernels/cuda/*.cu`` at run time with NVRTC, and keep the machine code for later.

Nothing is built at installation, so one wheel serves every torch and every GPU. Compiling needs no
GPU.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from sere_ray.util.errors import ArtifactError, UnsupportedError
from sere_ray.util.files import atomic_path

logger = logging.getLogger("vllm.sere_ray")

INSTALL = "pip install 'sere-ray[gpu]' (it brings cuda-core and NVRTC)"


HEADERS = (
    "launch.cuh",
    "rule.cuh",
    "cluster.cuh",
    "gate.cuh",
    "kept.cuh",
    "margin_row.cuh",
    "spare.cuh",
    "margin.cuh",
    "exchange.cuh",
)
"""What kernel files include."""


def source_path(name: str) -> Path:
    """A file of ``kernels/cuda/``: inside a wheel that folder lies beside this module.

    Raises:
        UnsupportedError: the installation lacks it.
    """
    here = Path(__file__).parent
    for folder in (here / "cuda", here.parents[1] / "kernels" / "cuda"):
        if (folder / name).is_file():
            return folder / name
    raise UnsupportedError(f"{name} is missing from this installation of sere-ray: reinstall it")


def compile_cubin(name: str, defines: Mapping[str, int], architecture: str) -> bytes:
    """Machine code of a kernel file, from the cache or from NVRTC.

    Args:
        name: file of ``kernels/cuda/``.
        defines: constants of the file, by name.
        architecture: for instance ``"sm_90"``.

    Raises:
        UnsupportedError: cuda-core or NVRTC is not installed, or does not know the architecture.
    """
    options = [f"{key}={value}" for key, value in sorted(defines.items())]
    sources = [source_path(file).read_text() for file in (name, *HEADERS)]
    key = "\n".join((*sources, *options, architecture, _nvrtc_version()))
    path = cache_folder() / f"{Path(name).stem}-{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = _compile(name, defines, architecture)
    try:
        # Many processes may start at once: each writes a file of its own and renames it.
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(cubin)
    except (OSError, ArtifactError) as error:
        logger.warning("sere-ray: kernel cache not written, every start compiles again: %s", error)
    return cubin


def check_compiler() -> None:
    """Find out early whether a kernel can be compiled.

    Raises:
        UnsupportedError: names the package that is missing.
    """
    _nvrtc_version()


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME/sere-ray``, or ``~/.cache/sere-ray``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sere-ray"


def _compile(name: str, defines: Mapping[str, int], architecture: str) -> bytes:
    from cuda.core import Program, ProgramOptions

    path = source_path(name)
    options = ProgramOptions(
        name=name,
        std="c++17",
        arch=architecture,
        define_macro=[(key, str(value)) for key, value in defines.items()],
        include_path=str(path.parent),
    )
    try:
        return bytes(Program(path.read_text(), "c++", options).compile("cubin").code)
    except Exception as error:  # cuda-core has no class of its own for this
        raise UnsupportedError(
            f"{name} does not compile for {architecture} with NVRTC {_nvrtc_version()}: {error}; "
            "compute capability 8.0 or higher and CUDA 12 or newer are needed"
        ) from error


@cache
def _nvrtc_version() -> str:
    try:
        import cuda.core  # noqa: F401  (named here so that its absence is reported here)
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise UnsupportedError(f"package {error.name} is not installed: {INSTALL}") from None
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise UnsupportedError(f"NVRTC is not installed ({error}): {INSTALL}") from None
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise UnsupportedError(f"NVRTC does not answer ({status}): {INSTALL}")
    return f"{major}.{minor}"
