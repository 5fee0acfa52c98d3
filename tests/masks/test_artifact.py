"""The file of masks: what comes back, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from sere_ray.artifact.gates import router_fingerprint
from sere_ray.masks.artifact import Level, MasksArtifact, MasksMetadata
from sere_ray.util.errors import ArtifactError

E, H = 6, 5
GATES = {i: torch.randn(E, H, generator=torch.Generator().manual_seed(i)) for i in (1, 3)}


def level(knob):
    return Level(knob=knob, slots_kept=1 - knob, experts_kept=0.9, kl_mean=knob / 10)


def masks():
    metadata = MasksMetadata(
        model_id="tiny",
        num_experts=E,
        top_k=2,
        router_fingerprint={layer: router_fingerprint(gate) for layer, gate in GATES.items()},
        levels=[level(0.1), level(0.4)],
        keep_first=True,
        penalty="batch",
        batch=4,
        balance=0.0,
        tokens=64,
        dataset="text.jsonl",
        date="2026-11-30T00:00:00+00:00",
    )
    weights = {i: {layer: gate * i for layer, gate in GATES.items()} for i in (1, 2)}
    return MasksArtifact(weights, metadata)


def refused(path, has_words, *words):
    for framework in ("pt", "np"):  # as engines read it, and the policy actor
        with pytest.raises(ArtifactError) as error:
            MasksArtifact.load(path, framework)
        has_words(str(error.value), str(path), *words)


def rewrite(path, change_tensors=lambda tensors: None, **changes):
    """The file with other tensors or other metadata."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["sere_ray_masks"])
    change_tensors(tensors)
    save_file(tensors, path, {"sere_ray_masks": json.dumps(metadata | changes)})


@pytest.fixture
def path(tmp_path):
    masks().save(tmp_path / "masks.safetensors")
    return tmp_path / "masks.safetensors"


def test_it_comes_back(path):
    found = MasksArtifact.load(path)
    assert found.metadata == masks().metadata
    of_level = found.level(2, path=str(path))
    assert torch.equal(of_level[3].weight, GATES[3] * 2)
    assert of_level[3].keep_first
    found.check_model(GATES, 2, path=str(path))


def test_a_level_that_does_not_exist(path, has_words):
    with pytest.raises(ArtifactError) as error:
        MasksArtifact.load(path).level(3, path=str(path))
    has_words(str(error.value), "level = 3", "levels 1..2", "1: 90%", "2: 60%")


@pytest.mark.parametrize(
    ("gates", "top_k", "words"),
    [
        (GATES, 4, ("top_k = 2", "has 4")),
        ({1: GATES[1]}, 2, ("layers = [1, 3]", "has [1]")),
        ({1: GATES[1], 3: GATES[3][:4]}, 2, ("shape of layer 3 = (6, 5)", "has (4, 5)")),
        ({1: GATES[1], 3: GATES[3] + 0.01}, 2, ("router fingerprint of layer 3", "other weights")),
    ],
)
def test_another_model(path, gates, top_k, words, has_words):
    with pytest.raises(ArtifactError) as error:
        MasksArtifact.load(path).check_model(gates, top_k, path=str(path))
    has_words(str(error.value), str(path), "'tiny'", "train-masks", *words)


def test_a_newer_format(path, has_words):
    rewrite(path, format_version=2)
    refused(path, has_words, "format_version = 2", "reads 1", "update sere-ray")


def test_metadata_that_is_not_ours(path, has_words):
    rewrite(path, surprise=1)
    refused(path, has_words, "damaged metadata", "surprise")
    save_file(load_file(path), path)
    refused(path, has_words, "is no file of masks")


def test_numbers_that_are_none(path, has_words):
    def spoil(tensors):
        tensors["levels.2.layers.3.mask"][0, 0] = torch.nan

    rewrite(path, spoil)
    refused(path, has_words, "level 2, layer 3", "NaN")


def test_levels_of_different_shape(path, has_words):
    def cut(tensors):
        tensors["levels.2.layers.3.mask"] = tensors["levels.2.layers.3.mask"][:, :4].contiguous()

    rewrite(path, cut)
    refused(path, has_words, "level 2, layer 3 is (6, 4), level 1 is (6, 5)")


def test_levels_that_lack_something(path, has_words):
    rewrite(path, lambda tensors: tensors.pop("levels.2.layers.3.mask"))
    refused(path, has_words, "level 2 has layers [1], level 1 has [1, 3]")
    rewrite(path, lambda tensors: tensors.pop("levels.2.layers.1.mask"))
    refused(path, has_words, "levels [1]", "describes [1, 2]")
    rewrite(path, lambda tensors: tensors.update({"levels.01.layers.1.mask": torch.zeros(1)}))
    refused(path, has_words, "unexpected tensor 'levels.01.layers.1.mask'")


def test_nothing_bad_is_written(tmp_path):
    bad = masks()
    bad = replace(bad, weights={**bad.weights, 2: {1: GATES[1]}})
    with pytest.raises(ArtifactError):
        bad.save(tmp_path / "masks.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_no_file(tmp_path, has_words):
    refused(tmp_path / "masks.safetensors", has_words, "no such file", "train-masks")
    (tmp_path / "cut").write_bytes(b"cut off")
    refused(tmp_path / "cut", has_words, "damaged safetensors file")
