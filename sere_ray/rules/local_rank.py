"""`prefer_local_rank`: of nearly equal stand-ins, one on a rank that the row visits anyway.

The reference of a variant of the rule. P, the slots that are re-routed and the experts that are
read are those of :func:`sere_ray.reroute`; only where a re-routed slot goes may differ. R ranks
hold the experts; the other symbols are those of the reference.

A row *visits* its home rank, which costs nothing to reach, and the ranks that hold the experts it
keeps: primary and critical ones. A re-routed slot with expert u, whose most similar expert in P is
v*, may go to v* and to every v of P with ``similarity[u, v] > similarity[u, v*] - tolerance`` that
meets the threshold. Of these it takes the most similar on a visited rank, the lowest index on
ties; v* if none is on one. Slots do not see where other slots of their row go: the result does
not depend on their order, and a thread per slot can compute it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sere_ray.rules.sere import Plan, apply_plan, make_plan

NO_RANK = -1
"""Home rank of rows that are on every rank, as under tensor parallelism: none is cheaper."""


class LocalRanks(NamedTuple):
    """What the variant needs beside the arguments of :func:`sere_ray.reroute`."""

    owner: Tensor
    """``[E]`` int64: the rank that holds each expert, 0..R-1."""
    home: Tensor
    """``[T]`` int64: the rank each row lives on, 0..R-1 or ``NO_RANK``."""
    tolerance: float
    """How much less similar a stand-in may be than the best one, exclusive: 0 allows the best
    alone, so it is the plain rule. Rounded to float32 once; the difference is float32, too."""


def reroute_local(
    topk_ids: Tensor,
    topk_weights: Tensor,
    similarity: Tensor,
    local: LocalRanks,
    *,
    row_kind: Tensor | None = None,
    select_top_k: int,
    threshold: float | None = None,
    min_primary_experts: int = 0,
) -> Tensor:
    """Re-route, and prefer visited ranks; other arguments as for :func:`sere_ray.reroute`.

    Returns:
        ``[T, K]`` new tensor of the dtype of ``topk_ids``.

    Raises:
        ValueError: a shape or dtype is wrong, or the tolerance negative.

    Example:
        >>> ids = torch.tensor([[0, 1], [2, 3]])
        >>> weights = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
        >>> similarity = torch.eye(4) + torch.tensor([0.4, 0.0, 0.5, 0.0])
        >>> local = LocalRanks(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1]), tolerance=0.2)
        >>> reroute_local(ids, weights, similarity, local, select_top_k=1)
        tensor([[0, 0],
                [2, 2]])
    """
    plan = make_plan(
        topk_ids,
        topk_weights,
        similarity,
        row_kind=row_kind,
        select_top_k=select_top_k,
        threshold=threshold,
        min_primary_experts=min_primary_experts,
    )
    return apply_plan_local(plan, topk_ids, similarity, local, row_kind, threshold)


def apply_plan_local(
    plan: Plan,
    topk_ids: Tensor,
    similarity: Tensor,
    local: LocalRanks,
    row_kind: Tensor | None,
    threshold: float | None,
) -> Tensor:
    """The variant of :func:`sere_ray.rules.sere.apply_plan`.

    Args:
        plan: of all rows, wherever they are.
        topk_ids: ``[T, K]`` of these rows.
        similarity: ``[E, E]`` float32.
        local: placement, home ranks and tolerance.
        row_kind: ``[T]`` int8 or None.
        threshold: rho, as the plan was made with.

    Returns:
        ``[T, K]`` new tensor of the dtype of ``topk_ids``.
    """
    _check(topk_ids, similarity, local)
    num_experts = similarity.shape[0]
    new_ids = apply_plan(plan, topk_ids, row_kind)
    likeness, stand_in = _best_on_ranks(plan, similarity, local, threshold)

    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    ids = torch.where(valid, topk_ids, 0).long()
    moves = new_ids != topk_ids
    kept_on = torch.where(valid & ~moves, local.owner[ids], NO_RANK)
    visited = torch.cat((local.home[:, None], kept_on), dim=1) + 1  # [T, 1 + K]
    options = (ids[:, :, None], visited[:, None, :])
    found = likeness[options]  # [T, K, 1 + K]
    most = found.amax(dim=2, keepdim=True)
    lowest = torch.where(found == most, stand_in[options], num_experts).amin(dim=2)
    takes = moves & (most.squeeze(2) > -torch.inf)
    return torch.where(takes, lowest.to(topk_ids.dtype), new_ids)


def _best_on_ranks(
    plan: Plan, similarity: Tensor, local: LocalRanks, threshold: float | None
) -> tuple[Tensor, Tensor]:
    """Per expert and rank the stand-in it would take there.

    Returns:
        ``[E, 1 + R]`` float32 similarity, -inf where there is none, and ``[E, 1 + R]`` int64
        expert; column 0 is ``NO_RANK``, where there never is one.
    """
    num_experts = similarity.shape[0]
    in_primary = similarity.masked_fill(~plan.primary, -torch.inf)
    best, nearest = in_primary.max(dim=1)  # lowest index
    bar = best - torch.tensor(local.tolerance, dtype=torch.float32, device=best.device)
    itself = torch.arange(num_experts, device=best.device)
    allowed = plan.primary & ((similarity > bar[:, None]) | (itself == nearest[:, None]))
    if threshold is not None:
        allowed &= similarity >= torch.tensor(threshold, dtype=torch.float32, device=best.device)
    candidates = similarity.masked_fill(~allowed, -torch.inf)
    num_ranks = 1 + max(int(local.owner.max()), int(local.home.max()) if len(local.home) else 0)
    likeness = candidates.new_full((num_experts, 1 + num_ranks), -torch.inf)
    stand_in = torch.zeros(likeness.shape, dtype=torch.int64, device=best.device)
    for rank in set(local.owner.tolist()):
        here = (local.owner == rank).nonzero().flatten()
        value, index = candidates[:, here].max(dim=1)  # lowest index
        likeness[:, rank + 1], stand_in[:, rank + 1] = value, here[index]
    return likeness, stand_in


def _check(topk_ids: Tensor, similarity: Tensor, local: LocalRanks) -> None:
    for name, tensor, size in (
        ("owner", local.owner, similarity.shape[0]),
        ("home", local.home, topk_ids.shape[0]),
    ):
        if tensor.shape != (size,) or tensor.dtype != torch.int64:
            raise ValueError(
                f"{name} must be int64 [{size}], got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if not local.tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {local.tolerance}")
