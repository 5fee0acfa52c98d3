"""What turns `loss` into tau: its curve, and what is no curve."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.artifact.strength import StrengthCurve
from sere_ray.util.errors import ArtifactError

from .strengths import make_strength

CURVE = {"rows": 4, "tau": (0.001, 0.01), "loss": (0.01, 0.1), "most": ((1, 2), (3, 4))}


def test_a_loss_between_two_is_a_tau_between_theirs():
    """By logarithms; demand that is given up as it is."""
    curve = StrengthCurve(**CURVE)
    assert [curve.at(loss).tau for loss in (0.01, 0.1)] == [0.001, 0.01]
    between = curve.at(0.1**1.5)
    assert between.tau == pytest.approx(0.1**2.5, rel=1e-3)
    assert between.most == (2, 3)
    taus = [curve.at(loss).tau for loss in (0.011, 0.02, 0.03, 0.09)]
    assert taus == sorted(taus)


def test_beyond_the_strongest_tau_a_number_of_rows_has_that_one():
    assert StrengthCurve(**CURVE).at(0.5).tau == 0.01


def test_rows_between_two_measured_numbers_have_taus_between_theirs():
    stages = make_strength().stages(0.01)
    assert [stage.up_to for stage in stages] == [4, 6, 10, 16]
    taus = [stage.tau for stage in stages]
    assert (taus[0], taus[-1]) == (0.001, 0.004)
    assert taus == sorted(taus)
    assert stages[0].most == (2000, 4000, 6000, 8000)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau": (0.01, 0.001)},
        {"tau": (0.0, 0.001)},
        {"loss": (0.1, 0.01)},
        {"loss": (0.0, 0.01)},
        {"most": ((1, 2),)},
        {"rows": 0},
    ],
)
def test_what_does_not_rise_is_no_curve(wrong):
    with pytest.raises(ValidationError):
        StrengthCurve(**{**CURVE, **wrong})


def artifact(layers, strengths):
    metadata = ArtifactMetadata(
        model_id="m",
        architecture="A",
        num_experts=4,
        top_k=2,
        metric="m",
        date="2026-11-30",
        strengths=strengths,
    )
    return SimilarityArtifact({layer: torch.eye(4) for layer in range(layers)}, metadata)


def test_an_artifact_keeps_it(tmp_path, has_words):
    path, strength = tmp_path / "a.safetensors", make_strength(layers=2)
    whole = artifact(2, {"margin": strength})
    whole.save(path)
    assert SimilarityArtifact.load(path).metadata.strengths == {"margin": strength}
    replace(whole, layers={0: torch.eye(4)}).save(path)
    with pytest.raises(ArtifactError) as caught:
        SimilarityArtifact.load(path)
    has_words(str(caught.value), "margin", "sere-ray strength")
