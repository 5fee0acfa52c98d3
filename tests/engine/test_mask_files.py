"""Files of learned masks in an engine: what is refused, before it starts and while it runs."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sere_ray.artifact.gates import router_fingerprint
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.engine.kv_identity import kv_word, masks_digest, matrices_digest
from sere_ray.engine.layer_checks import check_has_layer, check_input
from sere_ray.engine.loaded import _check_layers, _check_router_weights
from sere_ray.masks.served import check_beside
from sere_ray.policy.policy import Policy
from sere_ray.util.errors import ArtifactError, PolicyError, UnsupportedError
from tests.engine.conftest import artifact_path, sere_key
from tests.engine.test_cpu_union import EXPERTS, MARGIN, TOP_K, make_artifact
from tests.engine.test_masks import FILES, NONE, SERE, H, make_state, masks
from tests.engine.test_refusals import configure
from tests.masks.made import make_masks


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"level": 3}, ArtifactError, ("level = 3", "m.safetensors", "levels 1..2", "0 to mask")),
        ({"level": 3, "mode": "off"}, ArtifactError, ("level = 3",)),
        ({"masks": "other"}, PolicyError, ("sere.masks = 'other'", "'m.safetensors'", "restart")),
        ({"masks": None, "level": None}, PolicyError, ("sere.masks = None", "restart")),
        ({"similarity": "b"}, PolicyError, ("sere.similarity = 'b'", "send it the new one")),
    ],
)
def test_a_running_engine_keeps_its_files(changes, error, words, has_words):
    state = make_state(MARGIN)
    before = state.policy
    with pytest.raises(error) as caught:
        state.set_policy({**FILES, **MARGIN, "level": 1, **changes})
    has_words(str(caught.value), *words)
    assert state.policy is before


def test_an_artifact_is_not_handed_in_later(tmp_path, has_words):
    make_artifact().save(tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    state = make_state({**NONE, "similarity": None}, with_artifact=False)
    for artifact, words in ((None, "keeps its file (None)"), (content, "without an artifact")):
        with pytest.raises(PolicyError) as caught:
            state.set_policy({**FILES, **SERE, "level": 1}, artifact)
        has_words(str(caught.value), "sere.similarity = 'a.safetensors'", words, "restart")


def test_gates_that_masks_were_not_shown_right_with(has_words):
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    sizes = {"top_k": TOP_K, "global_num_experts": EXPERTS}
    state = make_state(NONE)
    state.note_gate(0, CPURouter(**sizes, scoring_func="sigmoid"))
    state.set_policy({**FILES, **MARGIN, "level": 0})
    with pytest.raises(UnsupportedError) as caught:
        state.set_policy({**FILES, **MARGIN, "level": 1})
    has_words(str(caught.value), "sere.level = 1", "'margin'", "layer 0", "none and sere only")
    state.set_policy({**FILES, **SERE, "level": 2})
    with pytest.raises(UnsupportedError) as caught:
        state.note_gate(1, CPURouter(**sizes, hash_indices_table=torch.zeros(9, 2)))
    has_words(
        str(caught.value), "sere.masks = 'm.safetensors'", "table", "layer 1", "leave masks out"
    )


def test_files_of_two_models(has_words):
    check_beside(masks(), make_artifact(), path="m")
    others = [
        (masks(top_k=2), "top_k = 2, but the similarity artifact has 3"),
        (masks(router_fingerprint={0: "0" * 32, 1: "1" * 32}), "router fingerprint of layer 1"),
    ]
    for other, words in others:
        with pytest.raises(ArtifactError) as caught:
            check_beside(other, make_artifact(), path="m")
        has_words(str(caught.value), "m: ", words, "make both of the model you serve")


def test_the_word_of_kv_blocks_follows_from_masks():
    digest, matrices = masks_digest(masks()), matrices_digest(make_artifact())

    def word(keys, masks=digest):
        policy = Policy.parse({**FILES, **keys}).for_model(top_k=TOP_K)
        return kv_word(policy, matrices, "w", masks)

    other = [masks_digest(of) for of in (masks(seed=1), masks(keep_first=False))]
    words = [word({**MARGIN, "level": level}) for level in (0, 1, 2)]
    words += [word({**NONE, "level": level}) for level in (1, 2)]
    words += [word({**MARGIN, "level": 1}, of) for of in other]
    assert None not in words
    assert len(set(words)) == len(words)
    elsewhere = {**MARGIN, "level": 1, "masks": "elsewhere"}
    assert word(elsewhere) == word({**MARGIN, "level": 1})
    bare = Policy.parse({**MARGIN, "similarity": "a"}).for_model(top_k=TOP_K)
    assert word({**MARGIN, "level": 0}) == kv_word(bare, matrices, "w"), "level 0 masks nothing"
    assert word({**NONE, "level": 0}) is None, "blocks are those of stock"
    assert masks_digest(None) == ""


# --- before the model loads -----------------------------------------------------------------------


@pytest.fixture
def moe(checkpoint):
    return checkpoint("qwen3_moe")


def masks_of(folder, path, **changes):
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    of = SimilarityArtifact.load(artifact_path(folder)).metadata
    shapes = dict.fromkeys(of.router_fingerprint, (of.num_experts, width))
    make_masks(shapes, of.router_fingerprint, **{"top_k": of.top_k, **changes}).save(path)
    return {"masks": str(path), "level": 1, **NONE}


def test_files_are_checked_before_the_model_loads(moe, tmp_path, has_words):
    key = masks_of(moe, tmp_path / "m.safetensors")
    configure(moe, key)
    configure(moe, sere_key(moe, masks=key["masks"], level=2))
    inside = masks_of(moe, moe / "m.safetensors")
    (moe / "m.safetensors").rename(tmp_path / "inside.safetensors")
    cases = [
        ({**key, "level": 3}, ["level = 3", "levels 1..2"]),
        (masks_of(moe, tmp_path / "k.safetensors", top_k=2), ["top_k = 2", "has 4", "train-masks"]),
        (
            masks_of(moe, tmp_path / "s.safetensors", synthetic=True),
            ["synthetic = True", "load_format = 'dummy'", "sere-ray train-masks"],
        ),
        ({**key, "masks": str(artifact_path(moe))}, ["is no file of masks"]),
        ({**key, "masks": str(tmp_path / "gone")}, ["gone", "no such file"]),
    ]
    for wrong, words in cases:
        with pytest.raises(ArtifactError) as caught:
            configure(moe, wrong)
        has_words(str(caught.value), *words)
    (tmp_path / "inside.safetensors").rename(moe / "m.safetensors")
    try:
        with pytest.raises(ArtifactError, match="would load it as weights"):
            configure(moe, inside)
    finally:
        (moe / "m.safetensors").unlink()


@pytest.mark.parametrize("with_artifact", [True, False])
def test_gates_of_other_weights(with_artifact, has_words):
    """As the model is loaded: the artifact here is synthetic, so masks alone are compared."""
    model = torch.nn.Module()
    model.block = torch.nn.Module()
    model.block.gate = torch.nn.Linear(H, EXPERTS, bias=False)
    fingerprint = {0: router_fingerprint(model.block.gate.weight), 1: "1" * 32}
    runner = SimpleNamespace(layer_name="block.experts", gate=None)
    keys = {**NONE, "similarity": "a.safetensors" if with_artifact else None}
    state = make_state(keys, with_artifact=with_artifact, router_fingerprint=fingerprint)
    if with_artifact:
        synthetic = state.artifact.metadata.model_copy(update={"synthetic": True})
        state.artifact = replace(state.artifact, metadata=synthetic)
    state.attached = {0: runner}
    _check_router_weights(state, model)
    _check_layers(state, [0, 1])
    state.attached = {1: runner}
    with pytest.raises(ArtifactError) as caught:
        _check_router_weights(state, model)
    has_words(str(caught.value), "m.safetensors: router fingerprint of layer 1", "other weights")
    if not with_artifact:
        with pytest.raises(ArtifactError, match=r"layers = \[1\], but the model has no experts"):
            _check_layers(state, [0])
        with pytest.raises(ArtifactError, match="mask of layer 2 = none"):
            check_has_layer(state, 2)


def test_rows_that_are_not_what_masks_were_trained_on(has_words):
    mask = torch.zeros(EXPERTS, H)
    for width, transform in ((H, None), (H + 2, None), (H, torch.nn.Identity())):
        config = SimpleNamespace(hidden_dim=width)
        runner = SimpleNamespace(
            layer_name="l", moe_config=config, routed_input_transform=transform
        )
        if (width, transform) == (H, None):
            check_input(runner, mask)
            continue
        with pytest.raises(UnsupportedError) as caught:
            check_input(runner, mask)
        has_words(str(caught.value), "sere.masks", "transformed or padded", "leave masks out")
