import pytest
from rich.console import Console

from sere_ray.errors import SereError
from sere_ray.loadtest import check
from sere_ray.loadtest.check import run_check


def test_times_are_those_that_the_stub_wrote(monkeypatch):
    """Few streams: on a busy machine many would test the machine."""
    monkeypatch.setattr(check, "_FACTORS", (1,))
    monkeypatch.setattr(check, "LIMIT_MS", 1000.0)
    saved = []
    run_check(saved.append, streams=4, seconds=1.5, console=Console(quiet=True))
    (row,) = saved[0]["rows"]
    assert row["itl_error_ms_p50"] < 0.2
    assert row["achieved_per_stream"] == pytest.approx(50, rel=0.1)
    assert row["requests"] >= 2


def test_errors_beyond_the_limit_are_an_error(monkeypatch, has_words):
    monkeypatch.setattr(check, "_FACTORS", (1,))
    monkeypatch.setattr(check, "LIMIT_MS", 1e-6)
    with pytest.raises(SereError) as error:
        run_check(lambda _: None, streams=2, seconds=1, console=Console(quiet=True))
    has_words(str(error.value), "50 tokens/s", "2 streams", "idle machine")
