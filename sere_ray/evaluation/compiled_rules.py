"""The rules ``sere`` and ``margin`` over many decode steps at once, by the compiled loops."""

from collections.abc import Callable

import torch
from torch import Tensor

from sere_ray.kernel import cpu_margin
from sere_ray.kernel.cpu_sere import merge_repeated, reroute_and_count
from sere_ray.rules import REROUTABLE, Choice, Layer


def compiled(
    name: str, ids: Tensor, weights: Tensor, scores: Tensor | None, layer: Layer
) -> Choice | None:
    """``RULES[name]`` by the compiled loops, which tests hold to it; None where there are none.

    Args:
        name: of the rule.
        ids: ``[..., T, K]``, all rows re-routable.
        weights: ``[..., T, K]``.
        scores: ``[..., T, E]``; None where the rule needs none.
        layer: its knobs.
    """
    if name not in _OF_STEP or ids.device.type != "cpu":
        return None
    steps = ids.shape[:-2].numel()
    of_steps = [None] * steps if scores is None else scores.flatten(0, -3)
    kinds = torch.full((ids.shape[-2],), REROUTABLE, dtype=torch.int8)
    arguments = zip(ids.flatten(0, -3), weights.flatten(0, -3), of_steps, strict=True)
    choices = [_OF_STEP[name](*of_step, kinds, layer) for of_step in arguments]
    all_ids, all_weights = zip(*choices, strict=True)
    return torch.stack(all_ids).view_as(ids), torch.stack(all_weights).view_as(weights)


def _sere(ids: Tensor, weights: Tensor, scores: None, kinds: Tensor, layer: Layer) -> Choice:
    assert layer.similarity is not None
    new_ids, _ = reroute_and_count(
        ids,
        weights,
        layer.similarity,
        kinds,
        select_top_k=layer.select_top_k,
        threshold=layer.threshold,
        min_primary_experts=layer.min_primary_experts,
    )
    if not 0 < layer.select_top_k < ids.shape[-1]:
        return new_ids, weights
    new_ids, weights, _ = merge_repeated(new_ids, weights, kinds, layer.num_experts)
    return new_ids, weights


def _margin(ids: Tensor, weights: Tensor, scores: Tensor, kinds: Tensor, layer: Layer) -> Choice:
    kept = cpu_margin.keep(cpu_margin.ask(ids, weights, scores, kinds, layer), layer)
    return cpu_margin.refill_rows(kept, ids, weights, scores, kinds, layer)


_OF_STEP: dict[str, Callable[..., Choice]] = {"sere": _sere, "margin": _margin}
