import fcntl
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

# A failed assertion in a module of helpers shows its values, too.
_packages = [file.parent.name for file in Path(__file__).parent.glob("*/__init__.py")]
pytest.register_assert_rewrite(*(f"tests.{name}" for name in _packages))
pytest_plugins = ["tests.workers"]

# Before any test imports vLLM or Ray: no hub, and vLLM's quiet logs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Models are tiny, and beside a test there is another one: threads would only wait for each other,
# and an engine that has several all the same must not spin while it waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser):
    parser.addoption(
        "--fail-on-skip",
        action="store_true",
        help="fail the run on every skip of a test that is not marked gpu",
    )
    parser.addoption(
        "--write-pictures",
        action="store_true",
        help="let the tests that draw pictures for docs/pictures replace those there",
    )


def pytest_collection_modifyitems(config, items):
    if "nightly" not in config.option.markexpr:
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if item not in nightly]
        config.hook.pytest_deselected(items=nightly)

    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))


def pytest_make_parametrize_id(val):
    """Bytes by their number: workers must collect equal names, and packed bytes hold the time."""
    return f"{len(val)}bytes" if isinstance(val, bytes) else None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if (
        report.skipped
        and not hasattr(report, "wasxfail")
        and item.config.getoption("--fail-on-skip")
        and not item.get_closest_marker("gpu")
    ):
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"skipped, but --fail-on-skip allows it only for gpu: {reason}"


@pytest.fixture
def has_words():
    """Check that a message names everything a user needs to fix the mistake."""

    def check(message, *words):
        missing = [word for word in words if not re.search(re.escape(word), message)]
        assert not missing, f"{message!r} does not name {missing}"

    return check


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    """A folder that all workers of a run have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextmanager
def made_once(folder):
    """Yields whether the block is the first that fills ``folder``; others wait for its end."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not folder.exists()


@pytest.fixture(scope="session")
def of_vllm(tmp_path_factory):
    """Requests, and the answers of plain vLLM with the demo model to them."""
    from sere_ray.bench.differential_servers import of_vllm, vllm_server

    with vllm_server(tmp_path_factory.mktemp("vllm")) as (url, key, _):
        return of_vllm(url, key, generated=48)


@pytest.fixture(scope="session")
def sdist_path(tmp_path_factory):
    """The source archive of this repository, built once in a worker."""
    return build("sdist", Path(__file__).parents[1], tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def wheel_path(common):
    """The wheel of this repository, built once."""
    folder = common / "wheel"
    with made_once(folder) as is_first:
        if is_first:
            build("wheel", Path(__file__).parents[1], folder)
    (path,) = folder.iterdir()
    return path


def build(kind, source, folder):
    """A distribution of a source tree; ``kind``: sdist or wheel."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", folder]
    subprocess.run([*command, source], check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path
