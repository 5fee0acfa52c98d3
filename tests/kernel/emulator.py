"""Compile and launch CUDA kernels on the CPU, to test their very source without a GPU."""

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path

import numpy as np
from torch import Tensor

COMPILER = shutil.which("g++")
HEADER = Path(__file__).with_name("cuda_on_cpu.h")
FLAGS = (
    "-std=c++17",
    "-O1",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # the same floats on every CPU
    "-fsanitize=bounds,shift-exponent",  # the header says what happens then
    "-static-libubsan",  # of which the header leaves nothing to link
)
KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+(?:void\s+)?'
    r"(?:__launch_bounds__\s*\(.*?\)\s+)?(?:void\s+)?(\w+)\s*\(",
    re.DOTALL,
)

Argument = np.ndarray | Tensor | Integral | Real | None


class KernelError(RuntimeError):
    """A launch that a GPU would hang in, refuse or answer with garbage."""


def compile_for_cpu(source: Path, defines: Mapping[str, str | int], cache: Path) -> ctypes.CDLL:
    """Compile a .cu file and load it.

    Args:
        source: what nvcc compiles; launchable are its functions that are declared with
            ``extern "C" __global__ void`` in this order. Files that it includes are not part of
            the cache's key.
        defines: macros, as nvcc would get them with ``-D``.
        cache: folder for compiled libraries, by the hash of all that goes into them.
    """
    unit = _translation_unit(source, defines)
    parts = (unit, source.read_text(), HEADER.read_text(), *FLAGS)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = cache / f"{source.stem}-{digest}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _compile(unit, library)
    return ctypes.CDLL(str(library))


def _translation_unit(source: Path, defines: Mapping[str, str | int]) -> str:
    """The header before the macros: one named like a template parameter must not reach it."""
    kernels = KERNEL.findall(source.read_text())
    lines = [
        f'#include "{HEADER}"',
        *(f"#define {name} {value}" for name, value in defines.items()),
        f'#include "{source.resolve()}"',
        *(f"CUDA_ON_CPU_LAUNCHER({name})" for name in kernels),
    ]
    return "\n".join(lines) + "\n"


def _compile(unit: str, library: Path) -> None:
    """Write to a name of this process first: tests run in parallel."""
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = ["g++", *FLAGS, "-x", "c++", "-", "-o", str(unfinished)]
    run = subprocess.run(command, input=unit, capture_output=True, text=True, check=False)
    if run.returncode:
        raise KernelError(f"g++ failed:\n{run.stderr}")
    unfinished.replace(library)


def launch(
    library: ctypes.CDLL,
    kernel: str,
    *arguments: Argument,
    threads: int,
    blocks: int = 1,
    cluster: int = 1,
    seed: int = 0,
) -> None:
    """Run a kernel to its end.

    Args:
        library: from :func:`compile_for_cpu`.
        kernel: name of the kernel.
        arguments: arrays and tensors go as pointers, None as the null pointer, numbers as values.
            The caller sees to it that element types are those of the kernel.
        threads: threads per block.
        blocks: blocks; they run one after the other. With clusters, how many of those.
        cluster: blocks per cluster; they take turns.
        seed: order of blocks, warps and lanes; 0 is the natural one. A correct kernel gives the
            same with each.

    Raises:
        KernelError: divergence at a barrier, an index out of bounds, ``__trap()``, or arguments
            of other kinds than the kernel's.
    """
    packed = [_pack(argument) for argument in arguments]
    kinds = "".join(kind for kind, _ in packed)
    values = [value for _, value in packed]
    launch_packed(
        library, kernel, kinds, values, threads, blocks=blocks, cluster=cluster, seed=seed
    )


def launch_packed(
    library: ctypes.CDLL,
    kernel: str,
    kinds: str,
    values: Sequence[int | float],
    threads: int,
    *,
    blocks: int = 1,
    cluster: int = 1,
    seed: int = 0,
) -> None:
    """The same with addresses; kinds are letters of the struct module, all of 8 bytes.

    Raises:
        KernelError: as for :func:`launch`.
    """
    function = getattr(library, f"launch_{kernel}")
    function.restype = ctypes.c_char_p
    packed = struct.pack(kinds, *values)
    error = function(blocks, cluster, threads, seed, kinds.encode(), packed).decode()
    if error:
        raise KernelError(f"{kernel}: {error}")


def _pack(argument: Argument) -> tuple[str, int | float]:
    """Letter of the struct module, all of 8 bytes, and value."""
    if argument is None:
        return "P", 0
    if isinstance(argument, Tensor):
        if not argument.is_contiguous() or argument.device.type != "cpu":
            raise ValueError("tensor must be contiguous and on the CPU")
        return "P", argument.data_ptr()
    if isinstance(argument, np.ndarray):
        if not argument.flags.c_contiguous:
            raise ValueError("array must be contiguous")
        return "P", argument.ctypes.data
    if isinstance(argument, Integral):
        return "q", int(argument)
    return "d", float(argument)
