"""What a policy costs, the slow way: the yardstick of the evaluator's own numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from sere_ray.evaluation.teacher_forced import Rerouter, divergence
from sere_ray.policy.bound import BoundPolicy


@dataclass(frozen=True)
class Quality:
    """Distance of a policy from the exact model over the scored rows."""

    rows: int
    top1_agreement: float
    """Share of rows whose most likely next token is the exact model's."""
    kl_mean: float
    """Mean KL(exact || re-routed) of next-token distributions, nats."""
    experts_before: float
    """Mean distinct experts per layer and decode step without the rule."""
    experts_read: float
    """Mean distinct experts per layer and decode step with the rule."""


def score(
    model: PreTrainedModel,
    input_ids: Tensor,
    exact_logits: Tensor,
    policy: BoundPolicy,
    similarity: Mapping[int, Tensor],
    *,
    batch: int,
    prompt_tokens: int,
) -> Quality:
    """Score a policy at one decode batch size.

    Args:
        model: the exact model.
        input_ids: ``[N, L]`` windows of held-out text, N a multiple of ``batch``.
        exact_logits: ``[N, L - prompt_tokens, V]`` of the exact model on the scored positions.
        policy: what to score.
        similarity: decoder layer index -> ``float32 [E, E]``.
        batch: B, sequences that advance together.
        prompt_tokens: positions that are exact and not scored.
    """
    rerouter = Rerouter(policy, similarity, prompt_tokens)
    agree, kl, rows = 0, 0.0, 0
    for texts, logits in rerouter.scored(model, input_ids, batch):
        exact = exact_logits[texts]
        agree += int((logits.argmax(-1) == exact.argmax(-1)).sum())
        kl += float(divergence(exact.double().log_softmax(dim=-1), logits).sum())
        rows += logits.shape[0] * logits.shape[1]
    steps = max(rerouter.reads.layer_steps, 1)
    return Quality(
        rows=rows,
        top1_agreement=agree / rows,
        kl_mean=kl / rows,
        experts_before=rerouter.reads.experts_before / steps,
        experts_read=rerouter.reads.experts_after / steps,
    )
