"""Step 7 of the rule: a row names an expert at most once.

Stock routing never names an expert twice in a row, and several expert kernels return wrong rows
where that happens. ``(w1 + w2) E(x) = w1 E(x) + w2 E(x)``, so merging changes nothing else.
"""

import torch
from torch import Tensor

from sere_ray.rules.interface import REROUTABLE, Choice

DROPPED = -1
"""Id of a slot that another one of its row has taken over; its weight is 0."""


def merge_repeated(
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    row_kind: Tensor | None = None,
    num_experts: int | None = None,
) -> Choice:
    """Merge the slots of a row that name the same expert.

    The slot of largest weight, of equal ones the first, takes the sum of their weights, added up in
    slot order in float32. The others become id -1, weight 0. All other slots are as they were, bit
    for bit.

    Args:
        topk_ids: ``[..., T, K]`` int32 or int64, after a rule. A negative id is a sentinel.
        topk_weights: ``[..., T, K]`` float, finite, before the rule: they say which slot is best.
        row_kind: ``[..., T]`` int8; rows that are not re-routable stay. None = all are.
        num_experts: E; ids from it on are sentinels, too. None = there are none.

    Returns:
        New ids and weights of the given dtypes.

    Example:
        >>> ids, weights = torch.tensor([[3, 5, 3]]), torch.tensor([[0.5, 0.375, 0.125]])
        >>> merge_repeated(ids, weights)
        (tensor([[ 3,  5, -1]]), tensor([[0.6250, 0.3750, 0.0000]]))
    """
    valid = topk_ids >= 0
    if num_experts is not None:
        valid = valid & (topk_ids < num_experts)
    if row_kind is not None:
        valid = valid & (row_kind == REROUTABLE)[..., None]
    of_pair = topk_ids[..., :, None] == topk_ids[..., None, :]  # [..., T, K, K]
    of_pair = of_pair & valid[..., :, None] & valid[..., None, :]
    own, other = topk_weights[..., :, None], topk_weights[..., None, :]
    slot = torch.arange(topk_ids.shape[-1], device=topk_ids.device)
    is_ahead = (other > own) | ((other == own) & (slot < slot[:, None]))
    dropped = (of_pair & is_ahead).any(dim=-1)

    sums = torch.zeros(topk_ids.shape, dtype=torch.float32, device=topk_ids.device)
    for index in range(topk_ids.shape[-1]):  # one after the other: float sums have an order
        weight = topk_weights[..., index, None].float()
        sums = sums + torch.where(of_pair[..., index], weight, 0.0)
    takes = (of_pair.sum(dim=-1) > 1) & ~dropped
    weights = torch.where(takes, sums.to(topk_weights.dtype), topk_weights)
    return topk_ids.masked_fill(dropped, DROPPED), weights.masked_fill(dropped, 0.0)
