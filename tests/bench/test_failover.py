"""Failover on the demo model: what each method does with experts that are gone."""

import numpy as np
import pytest
import torch

from sere_ray import assets
from sere_ray.bench.demo_model import heldout_windows
from sere_ray.bench.failover import METHODS, Failover, _row, score
from sere_ray.calibration.loading import load_model
from sere_ray.evaluation.teacher_forced import exact_logits

EXPERTS, PROMPT, LENGTH = 48, 24, 32
GONE = torch.arange(EXPERTS) < 12


def make(method, gone=GONE):
    generator = torch.Generator().manual_seed(0)
    similarity = {i: torch.rand(EXPERTS, EXPERTS, generator=generator) for i in range(4)}
    return Failover(method, gone, similarity, PROMPT)


@pytest.fixture(scope="module")
def model():
    return load_model(str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32")


@pytest.mark.parametrize("method", METHODS)
def test_nobody_is_asked_who_is_gone(method):
    ids = torch.rand(40, EXPERTS, generator=torch.Generator().manual_seed(1)).topk(4).indices
    weights = torch.rand(40, 4, generator=torch.Generator().manual_seed(2)) + 0.1
    failover = make(method)
    new_ids, new_weights = failover.replace(0, ids, weights)
    assert not GONE[new_ids[new_weights > 0]].any()
    kept = ~GONE[ids]
    assert torch.equal(new_ids[kept], ids[kept])
    if method == "drop, renormalised":
        some = kept.any(dim=1)
        assert torch.allclose(new_weights.sum(1)[some], weights.sum(1)[some])
        assert (new_weights[~some] == 0).all()
    else:
        assert torch.equal(new_weights[kept], weights[kept])
    likeness = failover.similarity[0]
    if method in ("similar", "random"):  # among the experts that these rows name
        named = sorted(set(ids[kept].tolist()))
        for u, v in zip(ids[~kept].tolist(), new_ids[~kept].tolist(), strict=True):
            assert v == max(named, key=lambda e: float(likeness[u, e]))
    if method == "similar, any expert":
        for u, v in zip(ids[~kept].tolist(), new_ids[~kept].tolist(), strict=True):
            assert v == max(range(12, EXPERTS), key=lambda e: float(likeness[u, e]))


@pytest.mark.parametrize("method", METHODS)
def test_with_nobody_gone_the_model_is_exact(model, method):
    windows = heldout_windows()[:4, :LENGTH]
    exact = exact_logits(model, windows, PROMPT)
    failover = make(method, torch.zeros(EXPERTS, dtype=torch.bool))
    kl, agreement, loss = score(
        model, windows, exact, failover.forward, batch=4, prompt_tokens=PROMPT
    )
    assert np.abs(kl).max() < 1e-9
    assert agreement.tolist() == [LENGTH - PROMPT] * 4
    with torch.inference_mode():
        expected = model(input_ids=windows, use_cache=False).logits
    logp = expected.double().log_softmax(-1)[:, PROMPT:-1]
    target = windows[:, PROMPT + 1 :, None]
    assert np.allclose(loss, -logp.gather(2, target).sum((1, 2)).numpy(), atol=1e-4)


def test_more_gone_is_worse_and_prompts_are_not_spared(model):
    windows = heldout_windows()[:4, :LENGTH]
    exact = exact_logits(model, windows, PROMPT)
    found = []
    for count, batch in ((4, 2), (24, 1)):
        failover = make("drop", torch.arange(EXPERTS) < count)
        kl, _, _ = score(model, windows, exact, failover.forward, batch=batch, prompt_tokens=PROMPT)
        found.append(kl.sum())
        assert failover.layer_steps == 4 // batch * 4 * (LENGTH - PROMPT)
    assert 0 < found[0] < found[1]
    with torch.inference_mode():
        before = model(input_ids=windows, use_cache=False).logits
    assert not torch.equal(failover.forward(model, windows)[:, 0], before[:, 0])


def test_row_of_several_masks():
    from sere_ray.bench.failover import Scores

    masks = [
        Scores(np.full(8, 64.0 * kl), np.full(8, 32.0), np.full(8, 63.0), 10.0) for kl in (1, 3)
    ]
    row = _row(4, "drop", 16, masks)
    assert (row["gone"], row["masks"], row["kl_mean"]) == (0.25, 2, 2.0)
    assert (row["kl_min_mask"], row["kl_max_mask"]) == (1.0, 3.0)
    assert row["kl_low"] == row["kl_high"] == 2.0, "texts do not differ"
    assert (row["top1_agreement"], row["perplexity"]) == (0.5, round(float(np.e), 3))
