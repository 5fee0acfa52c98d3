"""Compiling needs no GPU: from a wheel, by many processes at once; if it cannot, a clear word."""

import logging
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from sere_ray.kernel import compiler
from sere_ray.kernel.launcher import RuleKernel
from sere_ray.util.errors import UnsupportedError

ROOT = Path(__file__).parents[2]
DEFINES = RuleKernel(128, 8, torch.int32).defines("reroute", 512)
PROGRAM = """
import hashlib, sys, torch, sere_ray
from sere_ray.kernel.compiler import compile_cubin
from sere_ray.kernel.launcher import RuleKernel
defines = RuleKernel(128, 8, torch.int32).defines("reroute", 512)
cubin = compile_cubin("reroute.cu", defines, "sm_90")
print(sere_ray.__file__, cubin[:4] == b"\\x7fELF", hashlib.sha256(cubin).hexdigest())
"""


def run(python, cache, cwd):
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        [python, "-c", PROGRAM], env=environment, cwd=cwd, stdout=subprocess.PIPE, text=True
    )


def test_wheel_in_an_empty_environment_compiles(tmp_path, wheel_path):
    """The wheel alone; what it depends on lies on the path behind it."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel_path) as wheel:
        wheel.extractall(site)
    installed = Path(sysconfig.get_path("purelib"))
    (site / "dependencies.pth").write_text(f"{installed}\n")
    (site / "nvidia").symlink_to(installed / "nvidia")  # NVRTC is looked for in site-packages only
    process = run(venv / "bin" / "python", tmp_path / "cache", tmp_path)
    file, is_elf, _ = process.communicate(timeout=300)[0].split()
    assert Path(file).is_relative_to(site)
    assert is_elf == "True"
    assert len(list((tmp_path / "cache" / "sere-ray").iterdir())) == 1


def test_processes_that_start_together_share_one_file(tmp_path):
    started = [run(sys.executable, tmp_path, ROOT) for _ in range(4)]
    printed = {process.communicate(timeout=300)[0] for process in started}
    assert len(printed) == 1
    assert [path.suffix for path in (tmp_path / "sere-ray").iterdir()] == [".cubin"]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("reroute.cu", "reroute"),
        ("route.cu", "route_and_align"),
        ("across_ranks.cu", "reroute_gathered_and_align"),
    ],
)
def test_architectures(file, name, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    defines = RuleKernel(128, 8, torch.int32).defines(name, 512)
    first = compiler.compile_cubin(file, defines, architecture)
    assert first[:4] == b"\x7fELF"
    assert compiler.compile_cubin(file, defines, architecture) == first


@pytest.mark.parametrize("shape", [(512, 16), (1024, 32), (1024, 4)])
def test_largest_shape_fits_a_block(shape, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel = RuleKernel(*shape, torch.int64, any_gate=True)
    constants = kernel.defines("reroute", 1024)
    assert compiler.compile_cubin("reroute.cu", constants, "sm_80")
    constants = kernel.defines("reroute_gathered", 1024)
    assert compiler.compile_cubin("across_ranks.cu", constants, "sm_80")


def test_largest_shape_whose_top_k_shares_the_launch_fits_a_block(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel = RuleKernel(256, 16, torch.int64, logit_dtype=torch.float32)
    assert kernel.can_route
    assert not RuleKernel(256, 17, torch.int64).can_route
    assert compiler.compile_cubin("route.cu", kernel.defines("route_and_align", 1024), "sm_80")


def test_cache_that_cannot_be_written_only_warns(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert compiler.compile_cubin("reroute.cu", DEFINES, "sm_90")
    assert "kernel cache not written" in caplog.text


def test_unknown_architecture(tmp_path, monkeypatch, has_words):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UnsupportedError) as error:
        compiler.compile_cubin("reroute.cu", DEFINES, "sm_35")
    has_words(str(error.value), "reroute.cu", "sm_35", "8.0")


@pytest.mark.parametrize("package", ["cuda.core", "cuda.bindings"])
def test_missing_package_is_named(package, monkeypatch, has_words):
    monkeypatch.setitem(sys.modules, package, None)
    compiler._nvrtc_version.cache_clear()
    try:
        with pytest.raises(UnsupportedError) as error:
            compiler.check_compiler()
    finally:
        compiler._nvrtc_version.cache_clear()
    has_words(str(error.value), package, "not installed", "sere-ray[gpu]")


def test_missing_source(has_words):
    with pytest.raises(UnsupportedError) as error:
        compiler.source_path("nothing.cu")
    has_words(str(error.value), "nothing.cu", "reinstall")


@pytest.mark.parametrize(("experts", "slots"), [(1025, 8), (0, 1), (64, 33)])
def test_shapes_beyond_the_kernel(experts, slots, has_words):
    with pytest.raises(UnsupportedError) as error:
        RuleKernel(experts, slots, torch.int32)
    has_words(str(error.value), str(experts), str(slots), "1024", "32")
