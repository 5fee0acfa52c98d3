"""Grids are laid out by what a model's own routing reads, evenly routed or not."""

import copy

import numpy as np
import pytest
import torch

from sere_ray import assets
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.bench.demo_model import heldout_windows
from sere_ray.calibration.collect import find_moe_layers
from sere_ray.calibration.loading import load_model
from sere_ray.evaluation.decode_batches import DecodeBatches
from sere_ray.evaluation.grids import STRENGTH, Routing, grid, listed, rank_grid, with_strength
from sere_ray.evaluation.settings import as_policy, label, looks_at_ranks, rules_of
from sere_ray.evaluation.weight_statistics import ace_statistics
from sere_ray.policy.policy import RULE_NAMES
from sere_ray.rules import RULES

TOP_K, BATCH, EXPERTS, LIKED = 4, 16, 48, 12


def bind(keys):
    return as_policy(keys).for_model(top_k=TOP_K)


def chunk_of(model):
    generator = torch.Generator().manual_seed(0)
    statistics = {
        layer: {
            **named,
            "output_norm": torch.rand(EXPERTS, generator=generator) + 0.5,
            "stand_in_scale": torch.rand(EXPERTS, EXPERTS, generator=generator),
            "stand_in_loss": torch.rand(EXPERTS, EXPERTS, generator=generator),
            "directed_scale": torch.rand(EXPERTS, EXPERTS, generator=generator),
            "directed_loss": torch.rand(EXPERTS, EXPERTS, generator=generator),
            "novice_score": torch.rand(EXPERTS, generator=generator),
            "output_mean": torch.rand(EXPERTS, 128, generator=generator),
        }
        for layer, named in ace_statistics(model).items()
    }
    similarity = {i: torch.eye(EXPERTS) for i in range(4)}
    windows = heldout_windows()[:32, :40]
    return DecodeBatches(model, windows, 24, similarity, (1, 4), statistics)


@pytest.fixture(scope="module")
def model():
    return load_model(str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32")


@pytest.fixture(scope="module")
def even(model):
    return Routing(chunk_of(model), bind)


@pytest.fixture(scope="module")
def skewed(model):
    """Gates that choose among a quarter of the experts: the others are never above the mean."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in find_moe_layers(other).values():
            layer.gate_weight[LIKED:] = layer.gate_weight[:LIKED].mean(0)
    return Routing(chunk_of(other), bind)


def evenly(slots):
    """Experts that a batch reads where every row chooses so many evenly."""
    return EXPERTS * (1 - (1 - slots / EXPERTS) ** BATCH)


def test_places_lie_between_the_measured_unions(even, skewed):
    for routing in (even, skewed):
        first, every = (
            routing.reads({"rule": "topk", "select_top_k": k}, BATCH) for k in (1, TOP_K)
        )
        places = routing.places(BATCH)
        assert places == sorted(places)
        assert places[0] < first == places[1]
        assert 0.9 * every < places[-1] < every
    assert skewed.reads({"rule": "topk", "select_top_k": TOP_K}, BATCH) < evenly(1), (
        "laid out as if routing were even, the smallest budget would change nothing here"
    )
    assert even.reads({"rule": "topk", "select_top_k": TOP_K}, BATCH) > 0.9 * evenly(TOP_K)


@pytest.mark.parametrize("rule", STRENGTH)
def test_the_grid_covers_the_region_of_interest(rule, skewed):
    """What settings read, measured with the rule at work in all layers, from few to all experts."""
    _, first, *_, last = skewed.places(BATCH)
    settings = grid(rule, skewed, BATCH)
    measured = [skewed.chunk.measure(bind(keys), BATCH) for keys in settings]
    reads = np.sort([float(found.reads.mean()) for found in measured])
    kl = [float(found.kl.mean()) for found in measured]
    assert reads[0] < first + 0.6
    assert reads[-1] > last - 0.6
    if rule != "mone":  # its next expert may be one that all rows want
        assert np.diff(reads).max() < 0.4 * (last - first), "no large part is left out"
    assert max(kl) > 4 * min(kl)


def test_a_setting_is_found_for_a_number_of_experts(skewed, even):
    for routing in (skewed, even):
        wanted = routing.places(BATCH)[4]
        for rule in ("margin", "ace"):
            keys = routing.at({"rule": rule}, "tau", wanted, BATCH)
            assert routing.reads(keys, BATCH) == pytest.approx(wanted, rel=0.02)
        for rule in ("xshare", "lynx", "exfold"):
            keys = routing.at({"rule": rule}, "experts", wanted, BATCH)
            assert routing.reads(keys, BATCH) == pytest.approx(wanted, abs=0.8)


def test_a_list_keeps_its_proportions(even):
    keys = {"rule": "xshare", "experts": [10, 20, 10, 20]}
    found = even.at(keys, "experts", 22.0, BATCH)["experts"]
    assert np.array(found) / np.mean(found) == pytest.approx([2 / 3, 4 / 3, 2 / 3, 4 / 3], abs=0.05)
    assert even.reads({"rule": "xshare", "experts": found}, BATCH) == pytest.approx(22, abs=1)
    assert with_strength({"tau": [0.1, 0.1]}, "tau", 0.5, EXPERTS)["tau"] == [0.001, 0.001]
    assert with_strength({}, "experts", 0.0, EXPERTS) == {"experts": EXPERTS}
    assert with_strength({}, "experts", 1.0, EXPERTS) == {"experts": 1}


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
def test_grids_are_policies(rule, even):
    settings = grid(rule, even, BATCH)
    assert len({label(keys) for keys in settings}) == len(settings) > 2
    of_ranks = rank_grid(rule, 4, even, BATCH)
    assert bool(of_ranks) == (rule in ("xshare", "margin"))
    assert all(map(looks_at_ranks, of_ranks))
    assert not any(map(looks_at_ranks, settings))
    assert rank_grid(rule, 1, even, BATCH) == []
    for keys in settings + of_ranks:
        bind(keys)
    if rule not in STRENGTH:
        assert all(as_policy(keys).for_model(top_k=8) for keys in listed(rule, 8))


def test_grids_of_ranks_are_laid_out_by_the_busiest(even):
    settings = rank_grid("margin", 4, even, BATCH)
    reads = [even.reads(keys, BATCH, 4) for keys in settings]
    assert reads == sorted(reads)
    assert reads[-1] - reads[0] > 0.6 * (even.places(BATCH, 4)[-1] - even.places(BATCH, 4)[1])


def test_rules_to_choose_among_are_those_with_data():
    """`tune` and `advise` leave out what the artifact cannot serve."""
    some = dict.fromkeys(RULES["spare"].statistics, torch.zeros(4))

    def rules(statistics):
        layers = dict.fromkeys((0, 1), torch.eye(4))
        return rules_of(SimilarityArtifact(layers, None, statistics), RULE_NAMES)

    assert rules({}) == ("sere", "margin")
    assert rules({0: some, 1: some}) == ("sere", "margin", "spare")
    assert rules({0: some}) == ("sere", "margin"), "a layer has none"
    some.popitem()
    assert rules({0: some, 1: some}) == ("sere", "margin")
