"""The rules ``margin`` and ``spare``, and learned masks, in a real vLLM engine on a CPU."""

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
from sere_ray.evaluation.settings import Setting
from sere_ray.evaluation.statistics import draws, mean
from sere_ray.masks.artifact import MasksArtifact
from sere_ray.masks.compose import after_masks
from sere_ray.masks.plan import TrainSettings
from sere_ray.masks.slots import kept_slots
from sere_ray.masks.train import train_masks
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, REROUTABLE
from sere_ray.rules.gate import PLAIN, scores_of
from sere_ray.util.errors import ArtifactError, PolicyError, UnsupportedError
from tests.artifact.strengths import make_strength
from tests.engine import forced
from tests.engine.conftest import generate, prompts, running_engine
from tests.masks.conftest import SMALL

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
    {"rule": "none", "level": 1},
    {"select_top_k": 2, "level": 1},
    {**MARGIN, "level": 2},
    {**SPARE, "level": 1},
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
def masks(tmp_path_factory):
    """Path of masks of two levels, which may leave a row without experts."""
    path = tmp_path_factory.mktemp("rules") / "demo.masks.safetensors"
    train_masks(TrainSettings(**SMALL), path)
    return str(path)


@pytest.fixture(scope="module")
def ids_and_windows():
    windows = heldout_windows()[:BATCH]
    requests = [{"prompt_token_ids": row[:PROMPT_TOKENS].tolist()} for row in windows]
    # the answer's last token is not fed back, so its logits are those of position LENGTH - 2
    return windows, requests, [row[PROMPT_TOKENS:].tolist() for row in windows]


@pytest.fixture(scope="module")
def engine(similarity, masks):
    """Its masks mask nothing at the start."""
    key = {"similarity": similarity, "masks": masks, "level": 0, **MARGIN}
    with running_engine(assets.MODEL, key, dtype="float32", **forced.OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def with_files(similarity, masks):
    """A policy of these keys for that engine."""
    return lambda keys: Policy.parse({"similarity": similarity, "masks": masks, "level": 0, **keys})


@pytest.mark.parametrize("keys", SETTINGS, ids=lambda keys: ",".join(map(str, keys)))
def test_engine_gives_what_the_torch_rule_gives(
    engine, similarity, masks, with_files, monkeypatch, keys
):
    """On the very logits and hidden states, every row of mixed and decode-only steps, ``==``."""
    calls = []
    original = CpuState.choose

    def record(self, layer, topk_ids, topk_weights, router_logits, hidden):
        new = original(self, layer, topk_ids, topk_weights, router_logits, hidden)
        kinds = self.row_kind[: len(topk_ids)].clone()
        given = [t.clone() for t in (topk_ids, topk_weights, router_logits, hidden)]
        calls.append((layer, *given, kinds, *(part.clone() for part in new)))
        return new

    monkeypatch.setattr(CpuState, "choose", record)
    policy = with_files(keys)
    set_policy(engine, policy)
    read_counters(engine)
    batches = (2, 4, 8) if policy.by_rows else (8,)
    for batch in batches:
        generate(engine, prompts(batch, seed=5, length=(20, 60)), tokens=6)
    artifact = SimilarityArtifact.load(similarity)
    statistics = artifact.statistics
    bound = policy.for_model(top_k=TOP_K, strengths=artifact.metadata.strengths)
    of_level = MasksArtifact.load(masks).level(bound.level, path=masks)
    changed, sizes, masked = 0, set(), 0
    for layer, ids, weights, logits, hidden, kinds, new_ids, new_weights in calls:
        if REROUTABLE not in kinds:
            assert torch.equal(new_ids, ids)
            continue
        scores = scores_of(logits, PLAIN)
        rows = int((kinds == REROUTABLE).sum())
        sizes.add(rows)
        knobs = bound.for_rows(rows).of_layer(
            layer, EXPERTS, artifact.layers[layer], None, statistics[layer]
        )
        rows_left = torch.ones_like(ids, dtype=torch.bool)
        if of_level:
            rows_left = kept_slots(hidden, ids, weights, kinds, of_level[layer])
        masked += int((~rows_left).sum())
        expected_ids, expected_weights = after_masks(
            bound.rule, rows_left, ids, weights, scores, kinds, knobs
        )
        kept = expected_ids >= 0
        assert torch.equal(new_ids[kept], expected_ids[kept])
        assert (new_weights[~kept] == 0).all(), "a dropped slot weighs nothing"
        assert torch.equal(new_weights, expected_weights)
        assert torch.equal(new_ids[kinds == EXACT], ids[kinds == EXACT])
        changed += int((new_ids != ids).any())
    assert changed > 4
    assert sizes.issuperset(batches)
    counters = read_counters(engine)
    decode = counters["decode_only"]
    pairs = zip(decode["experts_after"], decode["experts_before"], strict=True)
    least = 0 if policy.guard else 1  # a guarded layer may have been exact in every step
    assert all(before - after >= least for after, before in pairs)
    assert (sum(decode["slots_rerouted"]) > 0) == (bound.rule != "none")
    counted = sum(sum(counters[kind]["slots_masked"]) for kind in ("decode_only", "mixed"))
    assert counted == masked
    assert (masked > 0) == (bound.level > 0)
    beyond = np.array(decode["beyond_range"])
    if policy.loss is None:
        assert not beyond.any(), "nobody knows a range"
    else:
        assert 0 < beyond.sum() < decode["steps"] * len(beyond)


@pytest.mark.parametrize(
    "keys", [MARGIN, SPARE, {"rule": "none", "level": 1}], ids=lambda keys: keys["rule"]
)
def test_kl_of_forced_tokens_is_within_the_evaluators_interval(
    engine, similarity, masks, with_files, ids_and_windows, keys
):
    """What a server would have thought, against what ``sere-ray evaluate`` says it does."""
    windows, requests, answers = ids_and_windows
    policy = with_files(keys)
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
    of_masks = {masks: MasksArtifact.load(masks)}
    batches = DecodeBatches(model, *given, statistics=artifact.statistics, masks=of_masks)
    setting = Setting.parse(policy.model_dump(exclude_none=True))
    measured = batches.measure(setting.for_model(top_k=TOP_K), BATCH)
    estimate = mean(measured.kl, draws(BATCH))
    print(f"server {of_server:.5f}, evaluator {estimate}")
    assert estimate.low <= of_server <= estimate.high
    assert of_server == pytest.approx(estimate.value, rel=0.1)
    assert np.isfinite(of_server)
    assert of_server > 1e-4


def test_a_policy_of_another_rule_is_checked_by_the_engine(engine, with_files, has_words):
    with pytest.raises(PolicyError) as caught:
        set_policy(engine, with_files({"rule": "margin", "tau": [0.1, 0.2]}))
    has_words(str(caught.value), "2 numbers", "4 MoE layers")
    with pytest.raises(ArtifactError) as caught:
        set_policy(engine, with_files({"rule": "none", "level": 3}))
    has_words(str(caught.value), "level = 3", "demo.masks.safetensors has levels 1..2")
    set_policy(engine, with_files({"rule": "sere", "select_top_k": 2}))


def test_gates_in_a_models_own_code_are_refused(tmp_path, has_words):
    folder, similarity = tmp_path / "model", tmp_path / "synthetic.safetensors"
    build(FAMILIES["phimoe"], folder)
    synthetic_artifact(folder).save(similarity)
    options = {"load_format": "dummy", "max_model_len": 64}
    key = {"similarity": str(similarity), **MARGIN}
    with pytest.raises(UnsupportedError) as caught, running_engine(folder, key, **options):
        pass
    has_words(str(caught.value), "sere.rule = 'margin'", "custom_routing_function", "'sere'")
