"""The rules ``margin`` and ``spare`` in a real vLLM engine on a CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sere_ray import assets
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.bench.demo_model import LENGTH, PROMPT_TOKENS, heldout_windows
from sere_ray.bench.families import build
from sere_ray.bench.family_configs import FAMILIES
from sere_ray.calibration import calibrate
from sere_ray.calibration.loading import load_model
from sere_ray.calibration.synthetic import synthetic_artifact
from sere_ray.engine.control import read_counters, set_policy
from sere_ray.engine.cpu.state import CpuState
from sere_ray.evaluation.decode_batches import DecodeBatches
from sere_ray.evaluation.statistics import draws, mean
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, REROUTABLE, RULES
from sere_ray.rules.gate import PLAIN, scores_of
from sere_ray.util.errors import PolicyError, UnsupportedError
from tests.artifact.strengths import make_strength
from tests.engine import forced
from tests.engine.conftest import generate, prompts, running_engine

pytestmark = pytest.mark.engine
TOP_K, EXPERTS, BATCH = 4, 48, 16
MOST = 3000
"""Demand that some steps of these tests give up more than, and others do not."""
MARGIN = {"rule": "margin", "tau": 0.006}
SPARE = {"rule": "spare", "tau": 0.006, "lead": 0.5, "limit": 0.9}
SETTINGS = (
    {**MARGIN, "tau": [0.002, 0.004, 0.006, 0.01]},
    {**MARGIN, "balance_ranks": True},
    {**MARGIN, "by_rows": [{"up_to": 3, "tau": 0.05}, {"up_to": 5, "tau": 0.0, "fill": 1.0}]},
    {"rule": "margin", "loss": 0.02},
    {"rule": "margin", "loss": 0.02, "guard": True},
    {**SPARE, "tau": [0.002, 0.004, 0.006, 0.01]},
    {**SPARE, "protect": False, "min_primary_experts": 0},
    {**SPARE, "by_rows": [{"up_to": 3, "tau": 0.05}, {"up_to": 5, "tau": 0.0, "limit": 0.0}]},
)


@pytest.fixture(scope="module")
def similarity(tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "demo.safetensors"
    artifact = calibrate(
        str(assets.MODEL),
        data=str(assets.CALIBRATION),
        out=path,
        sequences=32,
        device="cpu",
        statistics=("directed",),
    )
    strengths = {"margin": make_strength(layers=len(artifact.layers), most=MOST)}
    metadata = artifact.metadata.model_copy(update={"strengths": strengths})
    replace(artifact, metadata=metadata).save(path)
    return str(path)


@pytest.fixture(scope="module")
def ids_and_windows():
    windows = heldout_windows()[:BATCH]
    requests = [{"prompt_token_ids": row[:PROMPT_TOKENS].tolist()} for row in windows]
    # the answer's last token is not fed back, so its logits are those of position LENGTH - 2
    return windows, requests, [row[PROMPT_TOKENS:].tolist() for row in windows]


@pytest.fixture(scope="module")
def engine(similarity):
    key = {"similarity": similarity, **MARGIN}
    with running_engine(assets.MODEL, key, dtype="float32", **forced.OPTIONS) as running:
        yield running


def with_similarity(similarity, keys):
    return Policy.parse({"similarity": similarity, **keys})


@pytest.mark.parametrize("keys", SETTINGS, ids=lambda keys: ",".join(map(str, keys)))
def test_engine_gives_what_the_torch_rule_gives(engine, similarity, monkeypatch, keys):
    """On the very logits, every row of mixed and decode-only steps, ``==``."""
    calls = []
    original = CpuState.choose

    def record(self, layer, topk_ids, topk_weights, router_logits):
        new = original(self, layer, topk_ids, topk_weights, router_logits)
        kinds = self.row_kind[: len(topk_ids)].clone()
        given = (topk_ids.clone(), topk_weights.clone(), router_logits.clone())
        calls.append((layer, *given, kinds, *(part.clone() for part in new)))
        return new

    monkeypatch.setattr(CpuState, "choose", record)
    policy = with_similarity(similarity, keys)
    set_policy(engine, policy)
    read_counters(engine)
    batches = (2, 4, 8) if policy.by_rows else (8,)
    for batch in batches:
        generate(engine, prompts(batch, seed=5, length=(20, 60)), tokens=6)
    artifact = SimilarityArtifact.load(similarity)
    statistics = artifact.statistics
    bound = policy.for_model(top_k=TOP_K, strengths=artifact.metadata.strengths)
    changed, sizes = 0, set()
    for layer, ids, weights, logits, kinds, new_ids, new_weights in calls:
        if REROUTABLE not in kinds:
            assert torch.equal(new_ids, ids)
            continue
        scores = scores_of(logits, PLAIN)
        rows = int((kinds == REROUTABLE).sum())
        sizes.add(rows)
        knobs = bound.for_rows(rows).of_layer(layer, EXPERTS, None, None, statistics[layer])
        apply = RULES[bound.rule].apply
        expected_ids, expected_weights = apply(ids, weights, scores, kinds, knobs)
        kept = expected_ids >= 0
        assert torch.equal(new_ids[kept], expected_ids[kept])
        assert (new_weights[~kept] == 0).all(), "a dropped slot weighs nothing"
        assert torch.equal(new_weights, expected_weights)
        assert torch.equal(new_ids[kinds == EXACT], ids[kinds == EXACT])
        changed += int((new_ids != ids).any())
    assert changed > 4
    assert sizes.issuperset(batches)
    decode = read_counters(engine)["decode_only"]
    pairs = zip(decode["experts_after"], decode["experts_before"], strict=True)
    least = 0 if policy.guard else 1  # a guarded layer may have been exact in every step
    assert all(before - after >= least for after, before in pairs)
    assert sum(decode["slots_rerouted"]) > 0
    beyond = np.array(decode["beyond_range"])
    if policy.loss is None:
        assert not beyond.any(), "nobody knows a range"
    else:
        assert 0 < beyond.sum() < decode["steps"] * len(beyond)


@pytest.mark.parametrize("keys", [MARGIN, SPARE], ids=lambda keys: keys["rule"])
def test_kl_of_forced_tokens_is_within_the_evaluators_interval(
    engine, similarity, ids_and_windows, keys
):
    """What a server would have thought, against what ``sere-ray evaluate`` says it does."""
    windows, requests, answers = ids_and_windows
    policy = with_similarity(similarity, keys)
    found = []
    for mode in ("off", "on"):
        set_policy(engine, policy.model_copy(update={"mode": mode}))
        found.append(forced.log_probs(engine, requests, answers)[:, 1:])
    exact, rerouted = found  # the first logits are of a prompt row
    of_server = float((exact.exp() * (exact - rerouted)).sum(-1).mean())

    model = load_model(
        str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32"
    )
    artifact = SimilarityArtifact.load(similarity)
    given = windows[:, : LENGTH - 1], PROMPT_TOKENS, artifact.layers
    batches = DecodeBatches(model, *given, statistics=artifact.statistics)
    measured = batches.measure(policy.for_model(top_k=TOP_K), BATCH)
    estimate = mean(measured.kl, draws(BATCH))
    print(f"server {of_server:.5f}, evaluator {estimate}")
    assert estimate.low <= of_server <= estimate.high
    assert of_server == pytest.approx(estimate.value, rel=0.1)
    assert np.isfinite(of_server)
    assert of_server > 1e-4


def test_a_policy_of_another_rule_is_checked_by_the_engine(engine, similarity, has_words):
    with pytest.raises(PolicyError) as caught:
        set_policy(engine, with_similarity(similarity, {"rule": "margin", "tau": [0.1, 0.2]}))
    has_words(str(caught.value), "2 numbers", "4 MoE layers")
    set_policy(engine, with_similarity(similarity, {"rule": "sere", "select_top_k": 2}))


def test_gates_in_a_models_own_code_are_refused(tmp_path, has_words):
    folder, similarity = tmp_path / "model", tmp_path / "synthetic.safetensors"
    build(FAMILIES["phimoe"], folder)
    synthetic_artifact(folder).save(similarity)
    options = {"load_format": "dummy", "max_model_len": 64}
    key = {"similarity": str(similarity), **MARGIN}
    with pytest.raises(UnsupportedError) as caught, running_engine(folder, key, **options):
        pass
    has_words(str(caught.value), "sere.rule = 'margin'", "custom_routing_function", "'sere'")
