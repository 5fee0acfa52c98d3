"""Every overlay, rendered once with the kustomize that kubectl brings."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = ("cpu-demo", "single-node-2gpu", "multi-node")


def pytest_generate_tests(metafunc):
    if "overlay" in metafunc.fixturenames:
        metafunc.parametrize("overlay", OVERLAYS)


def render(folder):
    """The documents of a kustomization."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl renders the manifests: apt install kubernetes-client")
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.fixture(scope="session")
def rendered():
    """``rendered[overlay, part]`` with the parts ``deployment`` and ``calibration``."""
    folders = {"deployment": ".", "calibration": "calibration"}
    return {
        (overlay, part): render(ROOT / "k8s" / "overlays" / overlay / folder)
        for overlay in OVERLAYS
        for part, folder in folders.items()
    }


@pytest.fixture(params=["deployment", "calibration"])
def documents(request, rendered, overlay):
    """What `kubectl apply -k` sends for one overlay, deployment or calibration."""
    return rendered[overlay, request.param]


@pytest.fixture
def deployment(rendered, overlay):
    return rendered[overlay, "deployment"]


@pytest.fixture
def calibration(rendered, overlay):
    return rendered[overlay, "calibration"]


def of_kind(documents, kind):
    return [document for document in documents if document["kind"] == kind]


def only(documents, kind):
    (document,) = of_kind(documents, kind)
    return document
