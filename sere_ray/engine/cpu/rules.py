"""Rules other than ``sere`` in a CPU engine: the torch rule itself, on what the gate computed."""

from typing import Any

import torch
from torch import Tensor

from sere_ray.kernel.cpu_sere import StepCounts
from sere_ray.policy.policy import Policy
from sere_ray.rules import PADDING, RULES, Choice, Layer, name_dropped
from sere_ray.rules.interface import named_by
from sere_ray.util.errors import UnsupportedError


def scores_of(router_logits: Tensor) -> Tensor:
    """``[T, E]`` float32: what a gate of :func:`check_gate` ranks experts by."""
    return router_logits.float().softmax(dim=-1)


def choose_and_count(
    rule: str,
    topk_ids: Tensor,
    topk_weights: Tensor,
    router_logits: Tensor,
    row_kind: Tensor,
    layer: Layer,
    owner: Tensor | None,
) -> tuple[Choice, StepCounts]:
    """Apply a rule to one layer of a step.

    vLLM's CPU experts take no id of -1: a dropped slot names the row's best expert, with weight 0.

    Args:
        rule: name.
        topk_ids: ``[T, K]``, the gate's.
        topk_weights: ``[T, K]``.
        router_logits: ``[T, E]``; a softmax makes them the scores.
        row_kind: ``[T]`` int8.
        layer: what the rule knows of it.
        owner: ``[E]`` int64, rank of every expert; None = one rank.
    """
    scores = scores_of(router_logits)
    new_ids, new_weights = RULES[rule].apply(topk_ids, topk_weights, scores, row_kind, layer)
    rows = row_kind != PADDING
    before, after = (named_by(ids, rows, layer.num_experts) for ids in (topk_ids, new_ids))
    counts = count_choice(topk_ids, new_ids, row_kind, before, after, owner)
    return (name_dropped(new_ids, topk_ids), new_weights), counts


def count_choice(
    topk_ids: Tensor,
    new_ids: Tensor,
    row_kind: Tensor,
    before: Tensor,
    after: Tensor,
    owner: Tensor | None,
) -> StepCounts:
    """Counters of a layer.

    Args:
        topk_ids: ``[T, K]``, the gate's.
        new_ids: ``[T, K]``, the rule's; -1 = dropped.
        row_kind: ``[T]`` int8.
        before: ``[E]`` bool, experts that somebody names.
        after: ``[E]`` bool, likewise after the rule.
        owner: as for :func:`choose_and_count`.
    """
    changed = (new_ids != topk_ids).any(dim=1) & (row_kind != PADDING)
    return StepCounts(
        experts_before=int(before.sum()),
        experts_after=int(after.sum()),
        slots_rerouted=_slots_changed(topk_ids[changed], new_ids[changed]),
        critical_kept=0,
        experts_max_rank_before=_busiest(before, owner),
        experts_max_rank_after=_busiest(after, owner),
    )


def _slots_changed(before: Tensor, after: Tensor) -> int:
    """Slots whose expert the row did not have before, or that are dropped; order does not count."""
    stayed = (after[:, :, None] == before[:, None, :]).any(dim=2)
    return int((~stayed).sum())


def _busiest(named: Tensor, owner: Tensor | None) -> int:
    if owner is None or not named.any():
        return int(named.sum())
    return int(torch.bincount(owner[named]).max())


def check_gate(policy: Policy, router: Any) -> None:
    """Refuse a rule that reads scores which this gate does not choose by.

    Raises:
        UnsupportedError: the gate has groups, a bias or another function than softmax.
    """
    odd = [
        name
        for name in (
            "use_grouped_topk",
            "custom_routing_function",
            "e_score_correction_bias",
            "_hash_indices_table",
        )
        if getattr(router, name, None) is not None and getattr(router, name) is not False
    ]
    if getattr(router, "scoring_func", "softmax") != "softmax":
        odd.append(f"scoring_func = {router.scoring_func}")
    if odd and RULES[policy.rule].needs_scores:
        raise UnsupportedError(
            f"sere.rule = {policy.rule!r}: needs a gate that chooses the K best of a softmax; this "
            f"model's has {', '.join(odd)}; use rule = 'sere' or 'topk'"
        )
