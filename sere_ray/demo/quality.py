"""Quality of every policy on held-out text, teacher-forced, in this process."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sere_ray.artifact import SimilarityArtifact
from sere_ray.calibration.loading import load_model, load_tokenizer
from sere_ray.config import Policy
from sere_ray.demo import assets
from sere_ray.demo.settings import bound
from sere_ray.evaluation.teacher_forced import Quality, exact_logits, score

SEQUENCES = 32
LENGTH = 128
PROMPT_TOKENS = 64


def heldout_windows() -> Tensor:
    """``[SEQUENCES, LENGTH]`` token ids, one window from the start of each held-out text."""
    tokenizer = load_tokenizer(str(assets.MODEL))
    windows = [tokenizer(text)["input_ids"][:LENGTH] for text in assets.heldout_texts()]
    return torch.tensor([window for window in windows if len(window) == LENGTH][:SEQUENCES])


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
