from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import build_checkpoint, standard_library
from tests.one_thread import one_thread


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    one_thread()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint by architecture name, built once."""
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = build_checkpoint(name, tmp_path_factory.mktemp(name))
        return built[name]

    return get


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One long document of Python source."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n".join(p.read_text(encoding="utf-8") for p in standard_library(6)))
    return path
