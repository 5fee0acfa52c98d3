"""The chaos test in its short form, and what it calls an error."""

import json
import subprocess
import sys

import pytest

from sere_ray.bench.chaos import judge
from sere_ray.bench.completions import Reply

WHOLE = Reply(200, " a b", None, complete=True, retry_after=False, first_token_s=0.1, seconds=1)


def reply(**changes):
    return Reply(**{**vars(WHOLE), **changes})


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({}, "answers"),
        ({"text": " a c"}, "wrong_answers"),
        ({"text": " a"}, "wrong_answers"),
        ({"text": " a", "complete": False}, "unclean_errors"),
        ({"status": 503, "complete": False, "error": "lost", "retry_after": True}, "clean_errors"),
        ({"status": 503, "complete": False, "error": "lost"}, "unclean_errors"),
        ({"status": 503, "complete": False, "retry_after": True}, "unclean_errors"),
        ({"status": 500, "complete": False, "error": "internal"}, "unclean_errors"),
        ({"complete": False, "error": "lost"}, "clean_errors"),
    ],
)
def test_how_a_request_ended(changes, end):
    assert judge(reply(**changes), " a b")[0] == end


@pytest.mark.engine  # real Ray, stand-in engines
def test_kills_under_load(tmp_path):
    out = tmp_path / "chaos.json"
    command = [sys.executable, "-m", "sere_ray", "bench", "chaos", "--kills", "3"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    print(done.stderr, result)
    assert [kill["victim"] for kill in result["killed"]] == ["rank", "rank", "router actor"]
    for end in ("wrong_answers", "hung_clients", "unclean_errors"):
        assert result[end] == 0, result["errors_seen"]
    assert result["answers"] + result["clean_errors"] == result["requests"]
    ranks, router = result["killed"][:2], result["killed"][2]
    assert router["errors"] == 0
    for kill in ranks:
        assert kill["answers_meanwhile"] > 0, "the other gang did not go on"
        assert kill["last_error_s"] is None or kill["last_error_s"] < 5
