"""Learned masks in real engines on a GPU, full CUDA graphs on."""

import json

import pytest
import torch

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.engine.control import read_counters, set_policy
from sere_ray.masks.compose import after_masks
from sere_ray.masks.slots import kept_by
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, REROUTABLE, name_dropped
from sere_ray.util.errors import UnsupportedError
from tests.engine.conftest import generate, prompts, running_engine, sere_key, state_of
from tests.engine.test_gpu import GRAPHS, recorder
from tests.kernel.margin_cases import GPU_MATH, scores_of
from tests.masks.made import make_masks

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
__all__ = ["recorder"]

NONE = {"rule": "none"}
MARGIN = {"rule": "margin", "tau": 0.02}
SERE = {"rule": "sere", "select_top_k": 1}


@pytest.fixture
def files(checkpoint, tmp_path):
    """A checkpoint, and the keys that name files of it."""
    folder = checkpoint("qwen3_moe_64")
    similarity = sere_key(folder)["similarity"]
    metadata = SimilarityArtifact.load(similarity).metadata
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    shapes = dict.fromkeys(metadata.router_fingerprint, (metadata.num_experts, width))
    masks = make_masks(shapes, metadata.router_fingerprint, top_k=metadata.top_k, keep_first=False)
    masks.save(tmp_path / "random.masks.safetensors")
    return folder, {"similarity": similarity, "masks": str(tmp_path / "random.masks.safetensors")}


def test_stock_at_level_0_and_levels_that_move(files):
    """Live, to and fro, alone and beside rules; graphs are captured once."""
    folder, key = files
    with running_engine(folder, **GRAPHS) as engine:
        stock, _ = generate(engine, prompts())
    with running_engine(folder, {**key, **NONE, "level": 0}, **GRAPHS) as engine:
        reads = {}
        for name, changes in {
            "none 0": {**NONE, "level": 0},
            "none 2": {**NONE, "level": 2},
            "none 1": {**NONE, "level": 1},
            "observe": {**NONE, "level": 2, "mode": "observe"},
            "margin 2": {**MARGIN, "level": 2},
            "margin 0": {**MARGIN, "level": 0, "min_primary_experts": 64},
            "off": {**NONE, "level": 2, "mode": "off"},
        }.items():
            set_policy(engine, Policy.parse({**key, **changes}))
            read_counters(engine, reset=True)
            answers, _ = generate(engine, prompts())
            counted = read_counters(engine)["decode_only"]
            is_stock = name in ("none 0", "observe", "margin 0", "off")
            assert (answers == stock) == is_stock, name
            masked = sum(counted["slots_masked"])
            assert (masked > 0) == (name in ("none 1", "none 2", "observe", "margin 2")), name
            assert not (name.startswith("none") and any(counted["slots_rerouted"]))
            reads[name] = sum(counted["experts_after"]), masked
    assert reads["margin 2"][0] < reads["none 2"][0] < reads["none 1"][0] < reads["none 0"][0]
    assert reads["none 1"][1] < reads["none 2"][1]


@pytest.mark.parametrize("keys", [NONE, SERE, MARGIN], ids=lambda keys: keys["rule"])
def test_ids_and_counters_are_those_of_the_specification(files, recorder, keys):
    """``==`` with ``masks/compose.py`` on what each layer's gate and mask router said."""
    folder, files_of = files
    key = {**files_of, **keys, "level": 1}
    if keys["rule"] != "none":  # which has no floor
        key["min_primary_experts"] = 3
    options = {**GRAPHS, "max_num_batched_tokens": 64, "max_num_seqs": 11}
    with running_engine(folder, key, **options) as engine:
        state = state_of(engine)
        recorder.finish()
        recorder.steps.clear()
        read_counters(engine, reset=True)
        for level in (1, 2, 0, 2):
            set_policy(engine, Policy.parse({**key, "level": level}))
            generate(engine, prompts(9, seed=level, length=(3, 90)), tokens=6)
        recorder.finish()
        counters, artifact = read_counters(engine), state.artifact
    masked = changed = 0
    for kinds, bound, _, _, copies in recorder.steps:
        if REROUTABLE not in kinds:
            continue
        row_kind, rows = torch.from_numpy(kinds), len(kinds)
        for position, layer in enumerate(counters["layers"]):
            ids, weights, after, weights_after, logits, of_masks = (
                tensor[:rows].cpu() for tensor in copies[layer]
            )
            kept = torch.ones_like(ids, dtype=torch.bool)
            if bound.level:
                of_slots = of_masks.gather(1, ids.long())
                sizes = {"num_experts": logits.shape[1], "keep_first": False}
                kept = kept_by(of_slots, ids, weights, row_kind, **sizes)
            knobs = bound.of_layer(position, logits.shape[1], artifact.layers[layer])
            scores = scores_of(logits, state.gates.known[layer], GPU_MATH)
            given = ids, weights, scores, row_kind, knobs
            wanted, wanted_weights = after_masks(bound.rule, kept, *given)
            if bound.rule == "sere":  # Triton's experts take repeats, so nothing is merged
                left = (wanted_weights != 0) & kept
                assert torch.equal(after[left], wanted[left])
            else:
                named = name_dropped(wanted, ids)
                some = (wanted >= 0).any(dim=1)
                assert torch.equal(after[some], named[some])
                torch.testing.assert_close(weights_after, wanted_weights, rtol=1e-5, atol=1e-8)
            assert bool((weights_after[~kept] == 0).all())
            exact = row_kind == EXACT
            assert torch.equal(after[exact], ids[exact])
            masked += int((~kept).sum())
            changed += int((after != ids).sum())
    assert changed > masked > 0 or (bound.rule == "none" and masked > 0)
    found = sum(sum(counters[kind]["slots_masked"]) for kind in ("decode_only", "mixed"))
    assert found == masked


def test_masks_beside_a_gate_that_is_no_plain_product_are_refused(files, monkeypatch):
    """Its logits would come from another kernel than the one that both share."""
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear

    def forward(gate, rows):
        return original(gate, rows)

    original = GateLinear.forward
    folder, key = files

    class OtherGate(GateLinear):
        pass

    OtherGate.forward = forward
    monkeypatch.setattr("vllm.model_executor.models.qwen3_moe.GateLinear", OtherGate)
    with (
        pytest.raises(UnsupportedError, match=r"sere.masks: layer .* has a gate of its own"),
        running_engine(folder, {**key, **NONE, "level": 1}, **GRAPHS),
    ):
        pass
