"""Imports beside the start of Ray: at once, whole at the end, and ended with a start that fails."""

import sys
import threading
from types import SimpleNamespace

import pytest

from sere_ray.serve import imports
from sere_ray.serve.imports import imported_beside

SECONDS = 60
"""Longest wait; a test that passes waits for nothing."""


class Signals:
    """What the modules of a test and its block tell each other."""

    def __init__(self):
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.imported = []


@pytest.fixture
def signals(tmp_path, monkeypatch):
    """Two modules; the first one waits until it may end."""
    first = "from {0} import now\nnow.begun.set()\nassert now.may_end.wait({1})\n"
    (tmp_path / "late_first.py").write_text(
        first.format(__name__, SECONDS) + "now.imported.append(1)\n"
    )
    (tmp_path / "late_second.py").write_text(
        f"from {__name__} import now\nnow.imported.append(2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "HEAVY", ("late_first", "late_second"))
    monkeypatch.setattr(sys.modules[__name__], "now", Signals(), raising=False)
    threads = set(threading.enumerate())
    yield now  # noqa: F821
    assert set(threading.enumerate()) <= threads, "a thread is left"
    for name in imports.HEAVY:
        sys.modules.pop(name, None)


def test_the_block_runs_while_modules_are_imported(signals):
    with imported_beside():
        assert signals.begun.wait(SECONDS)
        assert signals.imported == []
        signals.may_end.set()
    assert signals.imported == [1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_block_that_fails_ends_the_imports_after_the_one_under_way(signals, error, monkeypatch):
    class Failed(threading.Event):
        def set(self):
            super().set()
            signals.may_end.set()

    monkeypatch.setattr(imports, "threading", SimpleNamespace(Event=Failed))

    def end():
        raise error

    def fail():
        with imported_beside():
            assert signals.begun.wait(SECONDS)
            end()

    with pytest.raises(error):
        fail()
    assert signals.imported == [1]


def test_an_import_that_fails_is_raised(signals, tmp_path):
    (tmp_path / "late_second.py").write_text("raise ImportError('no such library')")
    signals.may_end.set()
    with pytest.raises(ImportError, match="no such library"), imported_beside():
        pass
