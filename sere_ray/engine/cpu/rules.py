"""The rule ``margin`` in a CPU engine: the torch rule itself, on what the gate computed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sere_ray.kernel.cpu_sere import StepCounts
from sere_ray.policy.policy import Policy
from sere_ray.rules import PADDING, RULES, Choice, Layer, margin, name_dropped
from sere_ray.util.errors import UnsupportedError


def margin_and_count(
    topk_ids: Tensor,
    topk_weights: Tensor,
    router_logits: Tensor,
    row_kind: Tensor,
    layer: Layer,
    keep: Callable[[Tensor], Tensor],
) -> tuple[Choice, StepCounts]:
    """Apply the rule to one layer of a step.

    vLLM's CPU experts take no id of -1: a dropped slot names the row's best expert, with weight 0.

    Args:
        topk_ids: ``[T, K]``, the gate's.
        topk_weights: ``[T, K]``.
        router_logits: ``[T, E]``; a softmax makes them the scores.
        row_kind: ``[T]`` int8.
        layer: what the rule knows of it; ``owner`` is counted with, too.
        keep: from what these rows ask of each expert, ``[E]`` int64, which becomes what all ranks
            ask, to the experts that are kept, ``[E]`` bool.
    """
    scores = router_logits.float().softmax(dim=-1)
    asked = margin.ask(topk_ids, topk_weights, scores, row_kind, layer)
    kept = keep(asked)
    new_ids, new_weights = margin.refill_rows(kept, topk_ids, topk_weights, scores, row_kind, layer)
    named = margin.is_named(asked)
    changed = (new_ids != topk_ids).any(dim=1) & (row_kind != PADDING)
    counts = StepCounts(
        experts_before=int(named.sum()),
        experts_after=int(kept.sum()),
        slots_rerouted=_slots_changed(topk_ids[changed], new_ids[changed]),
        critical_kept=0,
        experts_max_rank_before=_busiest(named, layer.owner),
        experts_max_rank_after=_busiest(kept, layer.owner),
    )
    return (name_dropped(new_ids, topk_ids), new_weights), counts


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
            f"model's has {', '.join(odd)}; use rule = 'sere'"
        )
