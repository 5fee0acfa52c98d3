"""Teacher-forced scores on the demo model and the shipped data."""

import pytest
import torch

from sere_ray import assets
from sere_ray.bench.demo_model import heldout_windows
from sere_ray.calibration.loading import load_model
from sere_ray.evaluation.teacher_forced import Rerouter, exact_logits
from sere_ray.policy.bound import BoundPolicy
from tests.evaluation.scored import score

PROMPT = 24
LENGTH = 40


@pytest.fixture(scope="module")
def model():
    return load_model(str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32")


@pytest.fixture(scope="module")
def windows():
    return heldout_windows()[:8, :LENGTH]


@pytest.fixture(scope="module")
def similarity():
    generator = torch.Generator().manual_seed(0)
    return {i: torch.rand(48, 48, generator=generator).fill_diagonal_(1.0) for i in range(4)}


def policy(select_top_k, mode="on", floor=0, threshold=None):
    return BoundPolicy(
        mode=mode, select_top_k=select_top_k, threshold=threshold, min_primary_experts=floor
    )


@pytest.mark.parametrize("bound", [policy(4), policy(1, "observe"), policy(1, "off")])
def test_policies_that_change_nothing_score_as_the_exact_model(model, windows, similarity, bound):
    exact = exact_logits(model, windows, PROMPT)
    quality = score(model, windows, exact, bound, similarity, batch=8, prompt_tokens=PROMPT)
    assert quality.rows == 8 * (LENGTH - PROMPT)
    assert quality.top1_agreement == 1.0
    assert quality.kl_mean == 0.0


def test_rerouting_reads_less_and_costs_more_with_smaller_s(model, windows, similarity):
    exact = exact_logits(model, windows, PROMPT)
    two, one = (
        score(model, windows, exact, policy(size), similarity, batch=8, prompt_tokens=PROMPT)
        for size in (2, 1)
    )
    assert one.experts_read < two.experts_read < two.experts_before == one.experts_before
    assert 0 < two.kl_mean < one.kl_mean
    assert one.top1_agreement < two.top1_agreement < 1


def test_prompt_positions_stay_exact(model, windows, similarity):
    rerouted = Rerouter(policy(1), similarity, PROMPT).forward(model, windows)
    exact = model(input_ids=windows, use_cache=False).logits
    difference = (rerouted - exact).abs().amax(dim=(0, 2))
    # The experts' products have other shapes, so sums may round differently; no more than that.
    assert difference[:PROMPT].max() < 1e-3 < 1e-1 < difference[PROMPT:].max()


def test_default_floor_keeps_a_batch_of_one_exact(model, windows, similarity):
    exact = exact_logits(model, windows, PROMPT)
    quality = score(
        model, windows, exact, policy(1, floor=4), similarity, batch=1, prompt_tokens=PROMPT
    )
    assert quality.top1_agreement == 1.0
    assert quality.experts_read == quality.experts_before == 4.0


def test_the_model_is_left_as_it_was(model, windows, similarity):
    before = exact_logits(model, windows, PROMPT)
    Rerouter(policy(1), similarity, PROMPT).forward(model, windows)
    assert torch.equal(exact_logits(model, windows, PROMPT), before)
