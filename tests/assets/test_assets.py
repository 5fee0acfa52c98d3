"""The shipped model and data are what the model card says."""

import hashlib
import json
import math
import re

import torch

from sere_ray import assets
from sere_ray.assets import final_answer
from sere_ray.bench.demo_model import TOP_K
from sere_ray.calibration.loading import load_model, load_tokenizer
from sere_ray.demo.measure import label, policies, problems_at

METRICS = json.loads((assets.MODEL / "metrics.json").read_text())


def test_model_is_small_and_the_one_that_was_measured():
    files = list(assets.MODEL.iterdir())
    assert sum(file.stat().st_size for file in files) <= 6e6
    weights = (assets.MODEL / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == METRICS["weights_sha256"]
    config = json.loads((assets.MODEL / "config.json").read_text())
    assert config["num_experts_per_tok"] == TOP_K


def test_measured_quality_is_above_a_bigram_and_experts_are_alive():
    heldout = METRICS["heldout"]
    assert heldout["model"]["perplexity"] < heldout["bigram"]["perplexity"] / 4
    assert METRICS["arithmetic"]["accuracy"] >= 0.85
    assert sum(bool(layer["dead"]) for layer in METRICS["experts_on_heldout_text"]["layers"]) <= 1


def test_heldout_perplexity_can_be_measured_again():
    """On the first ten records: the card's figure, within the spread between records."""
    model = load_model(
        str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32"
    )
    tokenizer = load_tokenizer(str(assets.MODEL))
    loss = tokens = 0.0
    for text in assets.heldout_texts()[::10]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            loss += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert abs(math.log(METRICS["heldout"]["model"]["perplexity"]) - loss / tokens) < 0.15


def test_arithmetic_answers_are_right():
    problems = assets.arithmetic()
    assert len(problems) == 200
    for prompt, answer in problems:
        expression = re.fullmatch(r"Work out (.*)\.", prompt)
        assert expression, prompt
        assert set(expression[1]) <= set("0123456789+-* ")
        assert eval(expression[1]) == int(answer)


def test_heldout_modules_are_not_in_the_calibration_text():
    calibration = assets.CALIBRATION.read_text(encoding="utf-8")
    for text in assets.heldout_texts():
        assert json.dumps(text)[1:201] not in calibration


def test_final_answer():
    assert final_answer("2 + 2 = 4\nAnswer: 4") == "4"
    assert final_answer("Answer: 1\nAnswer: 2 ") == "2"
    assert final_answer("no end") is None


def test_policies_of_the_demo():
    names = [label(policy) for policy in policies("a.safetensors")]
    assert names == ["stock", "margin 0.01", "margin 0.025", "S=2"]
    assert [problems_at(c) for c in (1, 4, 16)] == [12, 48, 128]
