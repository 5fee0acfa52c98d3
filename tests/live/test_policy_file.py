"""A policy file with settings by the rows of a step, on two running ranks."""

import json

import pytest
import yaml

from tests.live.traffic import at_once, counted

pytestmark = pytest.mark.engine
BY_ROWS = [{"up_to": 1, "select_top_k": 4}, {"up_to": 64, "select_top_k": 1}]
"""K = 4 changes nothing: a lone row is exact although there is no floor, several are not."""


def test_a_policy_file_with_settings_by_rows(live, tmp_path):
    before, file = live.sere("policy")["policy"], tmp_path / "policy.yaml"
    keys = {"similarity": "of-the-tuner.safetensors", "select_top_k": 4, "min_primary_experts": 0}
    file.write_text(yaml.safe_dump({**keys, "by_rows": BY_ROWS}))
    done = live.cli("policy", "set", "--file", str(file))
    assert done.returncode == 0, done.stderr
    try:
        shown = json.loads(live.cli("policy", "get").stdout)["policy"]
        assert shown["by_rows"] == BY_ROWS
        assert (shown["similarity"], shown["mode"]) == (before["similarity"], "on")
        alone, _ = counted(live, live.complete)
        assert alone["decode_rows"] > 0
        assert alone["slots_rerouted"] == 0
        together, answers = counted(live, lambda: at_once(live, 8))
        assert [status for status, *_ in answers] == [200] * 8
        assert together["slots_rerouted"] > 0
        wrong = live.cli("policy", "set", "--file", str(file), "mode=off")
        assert wrong.returncode == 2
        assert "one of the two" in wrong.stderr
        file.write_text("by_rows: 3")
        wrong = live.cli("policy", "set", "--file", str(file))
        assert wrong.returncode == 2
        assert f"{file}.by_rows = 3: must be a list" in wrong.stderr
    finally:
        live.sere("policy", {key: before[key] for key in before if key != "similarity"})
