import json
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from rich.console import Console

from sere_ray.loadtest import check
from sere_ray.loadtest.check import run_check
from sere_ray.loadtest.stub import stub
from sere_ray.util.errors import SereError

QUIET = Console(quiet=True)


def test_times_are_those_that_the_stub_wrote(monkeypatch):
    """Few streams: on a busy machine many would test the machine."""
    monkeypatch.setattr(check, "_FACTORS", (1,))
    monkeypatch.setattr(check, "LIMIT_MS", 1000.0)
    saved = []
    run_check(saved.append, streams=4, seconds=3, console=QUIET)
    (row,) = saved[0]["rows"]
    assert row["itl_error_ms_p50"] < 0.2
    assert row["achieved_per_stream"] == pytest.approx(50, rel=0.1)
    assert row["requests"] >= 2


@pytest.mark.parametrize(
    ("good", "stub", "verdict", "rows"),
    [
        (100, 1000, "1 ms at p99 is exceeded at 64 streams x 150 tokens/s (9600 events/s)", 3),
        (1000, 100, "it, not the generator, is the limit", 3),
        (1000, 1000, "up to 64 streams x 800 tokens/s, the highest rate tried", 8),
    ],
)
def test_the_rate_at_which_it_ends_is_named(good, stub, verdict, rows):
    """Measured rows: within the limit up to a rate, followed by the stub up to another."""

    def measure(rate):
        errors = {"ttft_error_ms_p99": 0.1, "itl_error_ms_p99": 0.1, "generator_lag_ms_p99": 0.1}
        asked = {"streams": 64, "tokens_per_s_per_stream": rate, "events_per_s": 64 * rate}
        return {**errors, **asked, "within_limit": rate <= good, "stub_keeps_up": rate <= stub}

    found = check.climb(measure, QUIET)
    assert len(found) == rows
    assert verdict in check.verdict_of(found)


def test_errors_beyond_the_limit_at_once_are_an_error(monkeypatch, has_words):
    monkeypatch.setattr(check, "LIMIT_MS", 1e-6)
    with pytest.raises(SereError) as error:
        run_check(lambda _: None, streams=2, seconds=3, console=QUIET)
    has_words(str(error.value), "50 tokens/s", "2 streams", "idle machine")


def test_the_stub_answers_what_vllm_bench_serve_asks():
    with stub(None) as address:
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"{address}/50/metrics", timeout=5)
        body = json.dumps({"max_completion_tokens": 3}).encode()
        with urlopen(Request(f"{address}/50/v1/chat/completions", body), timeout=5) as answer:
            assert answer.read().count(b'"content"') == 3
