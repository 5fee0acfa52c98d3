"""What docs/serve.md tells a trainer to make of recorded ids, in torch."""

import torch


def weights_of_sere(recorded, gate_ids, gate_weights, similarity):
    """Weights of rows recorded under ``sere`` without a threshold.

    Args:
        recorded: ``[T, K]`` int64, in any order; -1 = another slot of the row took this one over.
        gate_ids: ``[T, K]`` int64, what the trainer's gate chooses.
        gate_weights: ``[T, K]``.
        similarity: ``[E, E]``, of the artifact.

    Returns:
        ``[T, E]`` float32, zero where the row reads nothing.
    """
    rows, num_experts = len(recorded), len(similarity)
    is_read = torch.zeros(rows, num_experts + 1, dtype=torch.bool)
    is_read.scatter_(1, recorded.where(recorded >= 0, num_experts), True)
    of_read = similarity[gate_ids].masked_fill(~is_read[:, None, :num_experts], float("-inf"))
    nearest = of_read.argmax(dim=-1)  # [T, K]: the lowest index on ties
    went = torch.where(is_read.gather(1, gate_ids), gate_ids, nearest)
    weights = torch.zeros(rows, num_experts)
    return weights.scatter_add_(1, went, gate_weights.float())


def weights_of_margin(recorded, gate_ids, gate_weights, logits, bound):
    """Weights of rows recorded under ``margin``.

    Args:
        recorded: ``[T, K]`` int64, -1 = the row found fewer than K.
        gate_ids: ``[T, K]`` int64, what the trainer's gate chooses.
        gate_weights: ``[T, K]``.
        logits: ``[T, E]`` of the gate.
        bound: with ``beta`` and ``fill`` among its knobs.

    Returns:
        ``[T, E]`` float32, zero where the row reads nothing.
    """
    knobs = {"beta": 0.5, "fill": 0.5, **dict(bound.knobs)}
    scores = logits.float().softmax(dim=-1)
    num_experts = scores.shape[1]
    is_read = torch.zeros(len(recorded), num_experts + 1, dtype=torch.bool)
    is_read = is_read.scatter(1, recorded.where(recorded >= 0, num_experts), True)[:, :num_experts]
    is_own = torch.zeros_like(is_read).scatter(1, gate_ids, True)
    former = scores.gather(1, gate_ids).sum(dim=1, keepdim=True)
    p = torch.where(is_own, scores, knobs["fill"] * scores).where(is_read, 0.0)
    scale = p.sum(dim=1, keepdim=True) ** knobs["beta"] * former ** (1 - knobs["beta"])
    weights = p * gate_weights.float().sum(dim=1, keepdim=True) / scale
    unchanged = torch.zeros_like(scores).scatter(1, gate_ids, gate_weights.float())
    return torch.where((is_own == is_read).all(dim=1, keepdim=True), unchanged, weights)


def weights_of_spare(recorded, gate_ids, gate_weights, statistics, bound):
    """Weights of rows recorded under ``spare``, with a ``limit`` below 1.

    Args:
        recorded: ``[T, K]`` int64, -1 = the row dropped a slot.
        gate_ids: ``[T, K]`` int64, what the trainer's gate chooses.
        gate_weights: ``[T, K]``.
        statistics: of the layer, of the artifact.
        bound: with ``limit`` among its knobs.

    Returns:
        ``[T, E]`` float32, zero where the row reads nothing.
    """
    loss, scale = statistics["directed_loss"], statistics["directed_scale"]
    limit, num_experts = dict(bound.knobs)["limit"], len(loss)
    is_read = torch.zeros(len(recorded), num_experts + 1, dtype=torch.bool)
    is_read = is_read.scatter(1, recorded.where(recorded >= 0, num_experts), True)[:, :num_experts]
    left = loss[gate_ids].masked_fill(~is_read[:, None], float("inf"))
    best = left.argmin(dim=-1)  # [T, K]: the lowest index on ties
    stays, fits = is_read.gather(1, gate_ids), left.gather(2, best[..., None])[..., 0] <= limit
    given = torch.where(stays, 1.0, torch.where(fits, scale[gate_ids, best], 0.0)) * gate_weights
    weights = torch.zeros(len(recorded), num_experts)
    weights.scatter_add_(1, torch.where(stays, gate_ids, best), given.float())
    alone = is_read * gate_weights.float().sum(dim=1, keepdim=True)
    return torch.where((stays | fits).any(dim=1, keepdim=True), weights, alone)
