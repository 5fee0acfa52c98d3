"""Learned masks as engines and deployments take them: a file beside an artifact, or alone."""

from pathlib import Path

from sere_ray.artifact.gates import other_gates
from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.masks.artifact import MasksArtifact, MasksMetadata
from sere_ray.policy.policy import Policy
from sere_ray.util.errors import ArtifactError


def load_masks(policy: Policy) -> MasksArtifact | None:
    """Those that a policy names, and its level checked; None = it names none.

    Raises:
        ArtifactError: as :meth:`MasksArtifact.load`, or there is no such level.
    """
    if policy.masks is None:
        return None
    masks = MasksArtifact.load(Path(policy.masks))
    check_level(policy.level, masks, path=policy.masks)
    return masks


def layers_of(artifact: SimilarityArtifact | None, masks: MasksArtifact | None) -> list[int]:
    """Decoder layers that a policy's files are of; none where it names no file."""
    if artifact is not None:
        return sorted(artifact.layers)
    return [] if masks is None else masks.layers


def about_model(
    artifact: SimilarityArtifact | None, masks: MasksArtifact | None
) -> ArtifactMetadata | MasksMetadata:
    """What a policy's files say of the model; it names at least one file."""
    if artifact is not None:
        return artifact.metadata
    assert masks is not None, "a policy without artifact names masks"
    return masks.metadata


def check_level(level: int | None, masks: MasksArtifact | None, *, path: str | None) -> None:
    """Refuse a level that the file has not.

    Raises:
        ArtifactError: names those there are.
    """
    if masks is not None and level is not None:
        masks.check_level(level, path=str(path))


def check_beside(
    masks: MasksArtifact | None, artifact: SimilarityArtifact | None, *, path: str | None
) -> None:
    """Refuse masks and an artifact of different models.

    Raises:
        ArtifactError: names the property and both values.
    """
    if masks is None or artifact is None:
        return
    ours, theirs = masks.metadata, artifact.metadata
    pairs: list[tuple[str, object, object]] = [
        ("layers", masks.layers, sorted(artifact.layers)),
        ("num_experts", ours.num_experts, theirs.num_experts),
        ("top_k", ours.top_k, theirs.top_k),
    ]
    pairs += other_gates(ours.router_fingerprint, theirs.router_fingerprint, masks.layers)
    for what, of_masks, of_artifact in pairs:
        if of_masks != of_artifact:
            raise ArtifactError(
                f"{path}: {what} = {of_masks}, but the similarity artifact has {of_artifact}: of "
                f"{ours.model_id!r} and {theirs.model_id!r}; make both of the model you serve"
            )
