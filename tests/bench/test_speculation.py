"""`sere-ray bench speculation`, small and on a CPU."""

import pytest
from rich.console import Console

from sere_ray.bench.models import get_model, with_layers
from sere_ray.bench.speculation import SpeculationPlan, lanes, measure
from sere_ray.util.errors import SereError


def plan(**changes):
    model = with_layers(get_model("demo"), 2)
    options = {"streams": 3, "num_drafts": 3, "steps": 4, "repeats": 1, "router": "uniform"}
    options |= {"lanes": ("ngram",), "arms": ("S=2", "S=K"), "compiled": False}
    return SpeculationPlan(model, **{**options, **changes})


@pytest.mark.engine
def test_rows_of_a_small_run():
    saved = []
    measure(plan(), console=Console(quiet=True), save=saved.append)
    (content,) = saved
    rows = {row["arm"]: row for row in content["rows"]}
    assert set(rows) == {"off", "S=2", "S=K"}
    for row in rows.values():
        assert row["lane"] == "ngram"
        assert 1 <= row["acceptance_length"] <= 4
        assert row["tokens_per_s"] > 0
        assert row["experts_before"] >= 4
    assert rows["off"]["speedup"] == 1
    assert rows["off"]["experts_after"] == rows["off"]["experts_before"]
    assert rows["S=2"]["experts_after"] < rows["S=2"]["experts_before"]
    assert rows["S=2"]["select_top_k"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router": "skewed"}, ["--router skewed", "needs a GPU"]),
        ({"lanes": ("forced",)}, ["--lanes forced", "needs a GPU"]),
        ({"lanes": ("eagle",)}, ["--lanes: 'eagle'", "forced, ngram"]),
        ({"arms": ("S=3",)}, ["--arms: 'S=3'", "margin"]),
    ],
)
def test_plans_that_do_not_fit(has_words, changes, words):
    with pytest.raises(SereError) as error:
        measure(plan(**changes), console=Console(quiet=True), save=print)
    has_words(str(error.value), *words)


@pytest.mark.parametrize("num_drafts", [1, 3, 5])
def test_forced_acceptance_is_what_vllm_takes(num_drafts):
    rates = lanes(num_drafts)["forced"].drafts["synthetic_acceptance_rates"]
    assert len(rates) == num_drafts
    assert rates == sorted(rates, reverse=True)
    if num_drafts >= 3:
        assert 1 + sum(rates) == pytest.approx(3.0)
