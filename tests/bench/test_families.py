"""Families that differ in kind, as `sere-ray bench families` tries all of them."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from sere_ray.bench.families import run_families
from sere_ray.bench.family_configs import FAMILIES
from sere_ray.util.errors import SereError

RESULT = Path(__file__).parents[2] / "docs" / "results" / "families-cpu.json"
OF_A_KIND = {
    "gpt_oss": "router with a bias, softmax over the chosen",
    "granitemoe": "gate within a router",
    "hunyuan_v1_moe": "gate.wg",
    "dots1": "through vLLM's Transformers back end",
    "glm4_moe": "sigmoid and selection bias",
    "gemma4": "refused: a scale for each expert",
}


def known():
    return {row["family"]: row for row in json.loads(RESULT.read_text())["rows"]}


def test_every_family_is_in_the_result():
    assert set(known()) == set(FAMILIES)
    for row in known().values():
        assert (row["message"] is None) == row["starts"]
        assert row["equal_at_k"] in (True, None)


@pytest.mark.engine
@pytest.mark.parametrize("name", OF_A_KIND)
def test_a_family_is_as_the_result_says(name):
    found = []
    run_families([name], found.append, console=Console(quiet=True))
    (row,) = found[-1]["rows"]
    same = ("family", "calibrates", "starts", "equal_at_k")
    assert {key: row[key] for key in same} == {key: known()[name][key] for key in same}, row
    if row["starts"]:
        assert row["experts_after"] < row["experts_before"]


def test_an_unknown_family(has_words):
    with pytest.raises(SereError) as error:
        run_families(["qwen9"], print, console=Console(quiet=True))
    has_words(str(error.value), "--only", "'qwen9'", "gpt_oss")
