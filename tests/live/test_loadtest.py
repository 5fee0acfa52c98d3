"""The load test against a real deployment of two ranks."""

import json
import os
import subprocess
import sys

import pytest

from tests.serve.deployment import ADMIN, API_KEY, EXACT_KEY, NO_TIER_KEY

pytestmark = pytest.mark.engine


def loadtest(live, *arguments, api_key=API_KEY, admin=ADMIN):
    environment = {**os.environ, "OPENAI_API_KEY": api_key, "SERE_ADMIN_TOKEN": admin}
    command = [sys.executable, "-m", "sere_ray", "loadtest", *arguments, "--url", live.url]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def test_ab_measures_policies_and_puts_the_old_one_back(live, tmp_path):
    before = live.sere("policy")["policy"]
    out, page = tmp_path / "ab.json", tmp_path / "ab.html"
    done = loadtest(
        live,
        *("ab", "--policies", "off,S=1:min_primary_experts=0", "--streams", "4"),
        *("--rounds", "2", "--seconds", "8", "--warmup", "1", "--max-lag-ms", "2000"),
        *("--usd-per-gpu-hour", "1", "--out", str(out), "--html", str(page)),
    )
    assert done.returncode == 0, done.stderr
    assert live.sere("policy")["policy"] == before
    off, rerouted = json.loads(out.read_text())["rows"]
    for row in (off, rerouted):
        assert row["failures"] == 0
        assert row["requests"] >= 4
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"]
        assert row["tpot_ms_p50"] > 0
        assert row["tokens_per_s"] > 0
        assert row["usd_per_million_output_tokens"] > 0
    assert rerouted["experts_read"] < off["experts_read"]
    assert "S=1:min_primary_experts=0" in page.read_text()


def test_keys_and_tiers_share_a_load(live, tmp_path):
    keys = tmp_path / "keys.yaml"
    entries = [{"key": API_KEY}, {"key": NO_TIER_KEY}, {"key": EXACT_KEY, "tier": "exact"}]
    keys.write_text(json.dumps(entries))
    out = tmp_path / "run.json"
    done = loadtest(
        live,
        *("run", "--rate", "3", "--seconds", "4", "--warmup", "0", "--max-lag-ms", "2000"),
        *("--keys", str(keys), "--out", str(out)),
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["failures"] == 0
    assert row["requests"] > 3


def test_wrong_key_and_wrong_token(live, tmp_path, has_words):
    options = ("ab", "--streams", "1", "--out", str(tmp_path / "x.json"))
    done = loadtest(live, *options, api_key="sk-wrong")
    assert done.returncode == 2
    has_words(done.stderr, "401", "OPENAI_API_KEY")
    done = loadtest(live, *options, admin="token-wrong")
    assert done.returncode == 2
    has_words(done.stderr, "401", "SERE_ADMIN_TOKEN")
    assert "Traceback" not in done.stderr
