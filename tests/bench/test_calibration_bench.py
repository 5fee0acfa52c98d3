"""The measurements of calibration: what they compare is what they say."""

import math
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cosine_similarity

from sere_ray import assets
from sere_ray.bench import calibration_robustness as robustness
from sere_ray.bench import calibration_speed as speed
from sere_ray.calibration.collect import find_moe_layers
from sere_ray.calibration.loading import load_model, load_tokenizer
from sere_ray.util.errors import SereError

QUIET = Console(quiet=True)


def demo_model() -> Any:
    return load_model(str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32")


def test_rates_of_every_arm() -> None:
    one, both = speed.rates("demo", tokens=2048, repeats=2, console=QUIET)
    for rows in (one, both):
        assert [row["arm"] for row in rows] == list(speed.ARMS)
        assert rows[0]["to_forward"] == 1
    for row in one:
        ratio = row["tokens_per_s"] / one[0]["tokens_per_s"]
        assert row["to_forward"] == pytest.approx(ratio, abs=0.002)
    for of_first, of_both in zip(one, both, strict=True):
        assert 0 < of_both["tokens_per_s_min"] <= of_both["tokens_per_s_max"]
        # A median of ratios within a repeat, which is no ratio of medians: of two, their mean.
        least, most = of_both["to_forward_min"], of_both["to_forward_max"]
        assert of_first["to_forward"] in (least, most)
        assert of_both["to_forward"] == pytest.approx((least + most) / 2, abs=0.0011)


def test_public_shapes_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SereError, match=r"--model = 'qwen3-30b-a3b': is for a host with a GPU"):
        speed.run_calibration_bench(
            print, model="qwen3-30b-a3b", tokens=2048, repeats=1, console=QUIET
        )


def test_weight_similarity_is_the_cosine_of_all_weights_of_an_expert() -> None:
    layers = find_moe_layers(demo_model())
    found = robustness.weight_similarity(layers)
    experts = layers[2].experts
    vectors = [
        torch.cat([experts.gate_up_proj[i].flatten(), experts.down_proj[i].flatten()])  # type: ignore[index,operator]
        for i in (5, 40)
    ]
    expected = (cosine_similarity(*vectors, dim=0).item() + 1) / 2
    assert found[2][5, 40].item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(found[2], found[2].T)


def test_stand_ins_of_equal_and_of_unrelated_similarity() -> None:
    layers = find_moe_layers(demo_model())
    one = robustness.weight_similarity(layers)
    other = robustness.random_similarity(layers)
    assert robustness.same_stand_in(one, one) == 1
    assert robustness.same_stand_in(one, other) == pytest.approx(1 / robustness.KEPT, abs=0.01)


def test_more_tokens_of_a_data_set_start_with_the_fewer_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(robustness, "TOKENS", (1024, 2048))
    monkeypatch.setattr(robustness, "METRICS", {"frobenius": 2048, "cka": 2048})
    model, tokenizer = demo_model(), load_tokenizer(str(assets.MODEL))
    windows = robustness._windows(robustness._data_sets()["arithmetic"], tokenizer)
    nested = robustness.calibrate_nested(model, "a", windows, QUIET)
    monkeypatch.setattr(robustness, "TOKENS", (2048,))
    alone = robustness.calibrate_nested(model, "a", windows, QUIET)
    assert [(p.tokens, p.metric) for p in nested[2:]] == [(p.tokens, p.metric) for p in alone]
    for ours, theirs in zip(nested[2:], alone, strict=True):
        for index, matrix in ours.similarity.items():
            torch.testing.assert_close(theirs.similarity[index], matrix, atol=1e-6, rtol=0)


def test_held_out_modules_are_in_no_data_set() -> None:
    heldout = {record["module"] for record in assets.records("heldout.jsonl")}
    texts = robustness._data_sets()["source"]
    assert heldout
    assert not any("Calendar printing functions" in text for text in texts)


def test_divergence_is_zero_where_nothing_is_re_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "TEXTS", 2)
    model = demo_model()
    judge = robustness.Judge(model, load_tokenizer(str(assets.MODEL)))
    similarity = robustness.random_similarity(find_moe_layers(model))
    assert judge.divergence(similarity, 4).max() < 1e-6
    changed = judge.divergence(similarity, 1)
    assert changed.shape == (2,)
    assert not math.isclose(changed.sum(), 0, abs_tol=1e-4)
