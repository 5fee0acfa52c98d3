"""Decode batches of the demo model: what is measured is what the single-batch score measures."""

import numpy as np
import pytest
import torch

from sere_ray import assets
from sere_ray.bench.demo_model import heldout_windows
from sere_ray.calibration.loading import load_model
from sere_ray.evaluation.decode_batches import DecodeBatches, Measured
from sere_ray.evaluation.settings import as_policy
from sere_ray.evaluation.statistics import Estimate, draws, mean, summarise
from sere_ray.evaluation.teacher_forced import exact_logits
from tests.evaluation.scored import score

PROMPT, LENGTH, TEXTS, TOP_K = 24, 40, 16, 4


@pytest.fixture(scope="module")
def model():
    return load_model(str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32")


@pytest.fixture(scope="module")
def windows():
    return heldout_windows()[:TEXTS, :LENGTH]


@pytest.fixture(scope="module")
def similarity():
    generator = torch.Generator().manual_seed(0)
    return {i: torch.rand(48, 48, generator=generator).fill_diagonal_(1.0) for i in range(4)}


@pytest.fixture(scope="module")
def batches(model, windows, similarity):
    return DecodeBatches(model, windows, PROMPT, similarity, ranks=(1, 2, 8))


def bound(**keys):
    return as_policy(keys).for_model(top_k=TOP_K)


@pytest.mark.parametrize("batch", [4, 16])
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_sere_scores_as_one_batch_at_a_time_does(
    batches, model, windows, similarity, batch, threshold
):
    policy = bound(select_top_k=1, threshold=threshold, min_primary_experts=0)
    found = batches.measure(policy, batch)
    exact = exact_logits(model, windows, PROMPT)
    expected = score(model, windows, exact, policy, similarity, batch=batch, prompt_tokens=PROMPT)
    assert found.kl.mean() == pytest.approx(expected.kl_mean, rel=1e-3)
    assert found.agreement.mean() == pytest.approx(expected.top1_agreement, abs=0.01)
    assert found.reads.mean() == pytest.approx(expected.experts_read, rel=1e-3)
    assert found.kl.shape == found.agreement.shape == (TEXTS, LENGTH - PROMPT)
    assert found.loss.shape == (TEXTS, LENGTH - PROMPT - 1)


@pytest.mark.parametrize(
    ("keys", "batch"),
    [
        ({"rule": "topk", "select_top_k": 4}, 8),
        ({"rule": "oea", "select_top_k": 4}, 8),
        ({"rule": "lynx", "experts": 48}, 8),
        ({"rule": "margin", "tau": 1.0}, 1),
    ],
)
def test_what_changes_nothing_is_exact(batches, model, windows, keys, batch):
    found = batches.measure(bound(**keys), batch)
    assert np.abs(found.kl).max() < 1e-5
    assert found.agreement.all()
    logp = exact_logits(model, windows, PROMPT).log_softmax(-1)[:, :-1]
    loss = -logp.gather(2, windows[:, PROMPT + 1 :, None]).squeeze(-1)
    assert np.allclose(found.loss, loss.numpy(), atol=1e-3)
    assert np.abs(found.delta_p).max() < 1e-5
    said = batches.predictions(bound(**keys), batch)
    assert np.allclose(said.log_p, -loss.numpy(), atol=1e-3)
    expected = logp.argmax(-1) == windows[:, PROMPT + 1 :]
    assert (said.hits == expected.numpy()).mean() > 0.99, "but for ties"
    assert said.reads == pytest.approx(found.reads.mean())
    if batch == 1:
        assert (found.reads == TOP_K).all()


@pytest.mark.parametrize(
    "keys",
    [
        {"rule": "topk", "select_top_k": 1},
        {"rule": "oea", "select_top_k": 1},
        {"rule": "xshare", "experts": 10},
        {"rule": "lynx", "experts": 10},
        {"rule": "margin", "tau": 0.02},
        {"rule": "margin", "tau": [0.02, 0.0, 1.0, 0.5], "beta": 1.0},
    ],
)
def test_stronger_rules_read_less_and_cost_more(batches, keys):
    exact = batches.measure(bound(rule="topk", select_top_k=4), 8)
    found = batches.measure(bound(**keys), 8)
    assert (found.reads < exact.reads).all()
    assert found.kl.mean() > 1e-3
    assert np.array_equal(found.busiest[1], found.reads)
    assert (found.busiest[8] >= found.reads / 8).all()
    assert (found.busiest[8] <= found.busiest[2]).all()
    assert (found.reads.reshape(2, 8) == found.reads.reshape(2, 8)[:, :1]).all()


@pytest.mark.parametrize(
    "keys",
    [
        {"rule": "xshare", "experts": 48, "max_per_rank": 2},
        {"rule": "margin", "tau": 0.05, "balance_ranks": True},
    ],
)
def test_rules_that_look_at_ranks_read_less_on_the_busiest(batches, keys):
    exact = batches.measure(bound(rule="topk", select_top_k=4), 16)
    one, eight = (batches.measure(bound(**keys), 16, ranks) for ranks in (1, 8))
    assert eight.busiest[8].mean() < exact.busiest[8].mean() - 1
    assert (eight.reads > one.reads).all(), "a cap of each, or the level of each, is more in all"


def test_by_rows_is_the_setting_of_the_batch(batches):
    margin = {"rule": "margin", "tau": 0.02}
    policy = bound(**margin, by_rows=[{"up_to": 4, "tau": 0.05}, {"up_to": 8, "tau": 0.1}])
    for batch, tau in ((4, 0.05), (8, 0.1), (16, 0.02)):
        found, alone = (
            batches.measure(policy, batch),
            batches.measure(bound(**margin | {"tau": tau}), batch),
        )
        assert np.array_equal(found.kl, alone.kl)
        assert np.array_equal(found.reads, alone.reads)


def test_the_model_is_left_as_it_was(batches, model, windows):
    before = exact_logits(model, windows, PROMPT)
    batches.measure(bound(rule="margin", tau=1.0), 16)
    assert torch.equal(exact_logits(model, windows, PROMPT), before)


def test_summary():
    texts, positions = 6, 10
    kl = np.tile(np.arange(texts, dtype=np.float32)[:, None], (1, positions))
    ones = np.ones((texts, positions), dtype=np.float32)
    moved = np.tile(np.float32([0.3, -0.4]), (texts, positions // 2))[:, 1:]
    found = Measured(kl, ones, ones[:, 1:], moved, ones[:, 0] * 7, ones[:, 0], {1: ones[:, 0]})
    row = summarise(found, draws(texts))
    assert (row["kl_mean"], row["experts_read_mean"], row["top1_agreement"]) == (2.5, 7.0, 1.0)
    assert row["kl_mean_95"][0] < 2.5 < row["kl_mean_95"][1]
    assert row["experts_read_mean_95"] == [7.0, 7.0], "texts do not differ"
    assert row["perplexity"] == round(float(np.e), 3)
    assert 4.5 < row["kl_p99"] <= 5
    assert (row["kl_median"], row["kl_p999"], row["kl_max"]) == (2.5, 5.0, 5.0)
    assert row["delta_p_rms"] == round(float(np.sqrt((4 * 0.09 + 5 * 0.16) / 9)), 5)


def test_intervals_cover_the_mean_about_as_often_as_they_say():
    generator = np.random.default_rng(1)
    shares, hits = draws(50), 0
    for _ in range(200):
        estimate = mean(generator.exponential(size=50), shares)
        assert isinstance(estimate, Estimate)
        hits += estimate.low <= 1.0 <= estimate.high
    assert 0.86 <= hits / 200 <= 0.99
