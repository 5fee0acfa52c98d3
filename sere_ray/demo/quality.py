"""Quality of every policy on held-out text, teacher-forced, in this process."""

from collections.abc import Callable, Sequence

import torch

from sere_ray import assets
from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.bench.demo_model import PROMPT_TOKENS, bound, heldout_windows
from sere_ray.calibration.loading import load_model
from sere_ray.evaluation.teacher_forced import Quality, exact_logits, score
from sere_ray.policy.policy import Policy


def measure_quality(
    policies: list[Policy],
    batches: Sequence[int],
    artifact: SimilarityArtifact,
    on_point: Callable[[], object],
) -> dict[tuple[Policy, int], Quality]:
    """Score every policy at every decode batch size, the same rows for all, in float32."""
    model = load_model(
        str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype="float32"
    )
    input_ids = heldout_windows()
    exact = exact_logits(model, input_ids, PROMPT_TOKENS)
    scores = {}
    for policy in policies:
        for batch in batches:
            scores[policy, batch] = score(
                model,
                input_ids,
                exact,
                bound(policy),
                artifact.layers,
                batch=batch,
                prompt_tokens=PROMPT_TOKENS,
            )
            on_point()
    return scores
