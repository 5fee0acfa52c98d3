"""What training minimises: distance to the exact model, and what is kept.

Notation of BEAM: m = sigmoid(W x) is a slot's soft mask, at 1/2 and above it is kept. Going forward
a slot counts 1 or 0, going backward as m (straight-through estimator).
"""

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from sere_ray.masks.slots import first_choices, mask_logits

_ALMOST = 1 - 1e-4
"""The most that a soft mask counts where log(1 - m) is taken."""


def soft_masks(
    hidden: Tensor, ids: Tensor, weights: Tensor, router: Tensor, *, keep_first: bool
) -> Tensor:
    """``[N, K]`` float32: m of each slot; 1 of first choices that are kept anyway.

    Args:
        hidden: ``[N, H]``, what the gate sees.
        ids: ``[N, K]``, the gate's.
        weights: ``[N, K]``.
        router: ``[E, H]`` float32.
        keep_first: whether first choices are kept.
    """
    soft = mask_logits(hidden, ids, router).sigmoid()
    return torch.where(first_choices(weights), 1.0, soft) if keep_first else soft


def straight_through(soft: Tensor) -> Tensor:
    """1 where a slot is kept, 0 where not; the gradient is that of the soft mask."""
    return (soft >= 0.5).to(soft.dtype) + soft - soft.detach()


def slots_penalty(soft: Tensor) -> Tensor:
    """L1 of BEAM: the mean of m over rows and their K slots."""
    return soft.mean()


def batch_penalty(soft: Tensor, ids: Tensor, num_experts: int, shape: tuple[int, int]) -> Tensor:
    """Expected share of a batch's experts that are read.

    An expert is read unless every row that chose it masks it: with m as independent probabilities
    that is 1 - prod (1 - m). What decoding pays for is their sum, here over what the exact batch
    reads; the mean over batches, so that parts of a step have the mean of their penalties. A batch
    is the rows at one position of the texts.

    Args:
        soft: ``[N, K]``, rows text by text.
        ids: ``[N, K]``.
        num_experts: E.
        shape: texts of a batch, and positions of a text; N is a multiple of their product.
    """
    texts, positions = shape
    slots = soft.shape[-1]

    def by_batch(rows: Tensor) -> Tensor:
        """``[batches, texts * K]``."""
        rows = rows.view(-1, texts, positions, slots).transpose(1, 2)
        return rows.reshape(-1, texts * slots)

    chosen = by_batch(ids.long())
    missing = by_batch(torch.log1p(-soft.clamp(max=_ALMOST)))
    log_unread = missing.new_zeros(len(chosen), num_experts).scatter_add(1, chosen, missing)
    named = torch.zeros_like(log_unread).scatter(1, chosen, 1.0)
    return ((1 - log_unread.exp()).sum(dim=-1) / named.sum(dim=-1)).mean()


def balance_penalty(soft: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """Load balance over experts: E times the sum of an expert's share of the kept slots and its
    share of the soft masks; 1 where all experts have the same."""
    chosen, soft = ids.long().flatten(), soft.flatten()
    of_slots = soft.new_zeros(num_experts).scatter_add(0, chosen, (soft >= 0.5).to(soft.dtype))
    of_masks = soft.new_zeros(num_experts).scatter_add(0, chosen, soft)
    shares = of_slots / of_slots.sum().clamp(min=1), of_masks / of_masks.sum()
    return num_experts * (shares[0] * shares[1]).sum()


def distance(exact: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(exact || masked) of next-token distributions, nats.

    Args:
        exact: ``[..., V]`` log-probabilities.
        logits: ``[..., V]``.
    """
    found = logits.float().log_softmax(dim=-1)
    rows = exact.shape[:-1].numel()
    return kl_div(found, exact, reduction="sum", log_target=True) / rows
