"""The rule ``none``: every row keeps what it has. For learned masks alone (sere_ray/masks)."""

from torch import Tensor

from sere_ray.rules.interface import Choice, Layer


def none(
    topk_ids: Tensor, topk_weights: Tensor, scores: Tensor | None, row_kind: Tensor, layer: Layer
) -> Choice:
    """Copies of ids and weights."""
    del scores, row_kind, layer
    return topk_ids.clone(), topk_weights.clone()
