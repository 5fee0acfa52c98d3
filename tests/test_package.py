"""What is shipped: one import package with its data, and the plugin entry point."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from sere_ray import __version__
from tests.conftest import build

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def wheel(wheel_path):
    with zipfile.ZipFile(wheel_path) as archive:
        yield archive


def test_one_import_package(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"sere_ray"}


def test_demo_model_and_data_are_inside(wheel):
    names = set(wheel.namelist())
    for name in ("model/model.safetensors", "model/README.md", "data/heldout.jsonl"):
        assert f"sere_ray/assets/{name}" in names
    assert "sere_ray/assets/data/LICENSE-PSF.txt" in names


def test_the_page_and_the_licence_of_its_library_are_inside(wheel):
    names = set(wheel.namelist())
    for name in ("index.html", "app.js", "uPlot.iife.min.js", "uPlot.LICENSE.txt"):
        assert f"sere_ray/serve/gateway/ui/static/{name}" in names


def test_all_files_of_the_package_are_inside(wheel):
    """Programs in other languages, too: HAProxy's waiting room is one in Lua."""
    done = subprocess.run(
        ["git", "ls-files", "sere_ray"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tracked = {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}
    assert "sere_ray/proxy/waiting_room.lua" in tracked
    assert tracked <= set(wheel.namelist())


def test_kernels_constraints_and_examples_are_inside(wheel):
    """Each as it lies here; nothing else is put below their folders."""
    places = {
        "sere_ray/kernel/cuda/": sorted((ROOT / "kernels" / "cuda").iterdir()),
        "sere_ray/examples/constraints/": sorted((ROOT / "constraints").iterdir()),
        "sere_ray/examples/deploy/": sorted((ROOT / "deploy").glob("*.yaml")),
    }
    for folder, files in places.items():
        assert files
        packed = sorted(name for name in wheel.namelist() if name.startswith(folder))
        assert packed == [folder + file.name for file in files]
        for name, file in zip(packed, files, strict=True):
            assert wheel.read(name) == file.read_bytes(), name


def test_the_wheel_of_the_source_archive_is_the_same(wheel, sdist_path, tmp_path):
    with tarfile.open(sdist_path) as archive:
        archive.extractall(tmp_path / "source")  # our own
    (source,) = (tmp_path / "source").iterdir()
    assert source.name == f"sere_ray-{__version__}"
    with zipfile.ZipFile(build("wheel", source, tmp_path / "wheel")) as rebuilt:
        assert sorted(rebuilt.namelist()) == sorted(wheel.namelist())
        for name in wheel.namelist():
            assert rebuilt.read(name) == wheel.read(name), name


def test_the_source_archive_holds_all_that_is_tracked(sdist_path):
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}
    with tarfile.open(sdist_path) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    missing = {name for name in tracked - files if not name.startswith(".ci/")}
    assert not missing
    assert files - tracked <= {"PKG-INFO"} | untracked()


def untracked():
    """What a developer's tree has besides: new files that git would take."""
    command = ["git", "ls-files", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def test_the_version_is_said_in_one_place_and_repeated_right():
    """Files that cannot ask the package: citation, images and what the docs build and run."""
    files = ["CITATION.cff", "deploy/Dockerfile", *ROOT.glob("k8s/components/*/*.yaml")]
    patterns = (r"^version: (\S+)", r"sere-ray:(\d[\d.]*\d)", r"newTag: (\d[\d.]*\d)")
    found = {}
    for path in (ROOT / file for file in (*files, *DOCS.glob("*.md"))):
        for pattern in patterns:
            for version in re.findall(pattern, path.read_text(), re.MULTILINE):
                found.setdefault(version, set()).add(path.name)
    assert set(found) == {__version__}, found
    assert {"CITATION.cff", "Dockerfile", "kustomization.yaml"} <= found[__version__]


def test_entry_points(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    assert "sere = sere_ray.engine.plugin:register" in text
    assert "sere-ray = sere_ray.cli.main:app" in text


def test_no_other_folder_is_importable():
    folders = ("kernels", "calibration", "k8s", "loadtest", "deploy")
    assert not [f for f in folders if (ROOT / f / "__init__.py").exists()]


def test_importing_the_package_touches_neither_vllm_nor_ray():
    program = (
        "import sys, sere_ray; from sere_ray.engine import plugin; "
        "sys.exit(bool({'vllm', 'ray', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
