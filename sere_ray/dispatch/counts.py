"""What dispatch moves and what ranks read, counted on the device without another exchange."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DISPATCH_COUNTS = (
    "rows",
    "rows_sent_before",
    "rows_sent_after",
    "rows_kept_before",
    "rows_kept_after",
    "experts_read_before",
    "experts_read_after",
    "experts_read_max_before",
    "experts_read_max_after",
)
"""Names of the counts of one call, int64, this rank's unless said otherwise.

``rows``: rows that name an expert. ``rows_sent_*``: copies of them that leave for another rank,
``rows_kept_*``: that stay. ``experts_read_*``: distinct experts named by any row of any rank,
**summed over ranks** of their owners. ``experts_read_max_*``: of the rank that reads most.
``before`` is what the gate's own ids would have made of it.
"""
_BITS = 31
"""Flags in a word of the header: what an int32 holds without its sign."""


def flag_words(flags: Tensor) -> Tensor:
    """Pack ``[E]`` bool into ``[ceil(E / 31)]`` int32."""
    count = -(-flags.shape[0] // _BITS)
    padded = torch.zeros(count * _BITS, dtype=torch.int64, device=flags.device)
    padded[: flags.shape[0]] = flags
    return (padded.view(count, _BITS) << _shifts(flags.device)).sum(dim=1).to(torch.int32)


def any_flag(words: Tensor, num_experts: int) -> Tensor:
    """``[E]`` bool: set in any row of ``words [ranks, W]``."""
    bits = (words.unsqueeze(-1) >> _shifts(words.device)) & 1
    return bits.any(dim=0).flatten()[:num_experts]


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(_BITS, dtype=torch.int32, device=device)


def count_call(
    visits: tuple[Tensor, Tensor], named: tuple[Tensor, Tensor], owner: Tensor, rank: int
) -> Tensor:
    """Counts of one call, in the order of ``DISPATCH_COUNTS``; no host synchronisation.

    Args:
        visits: before and after the rule, ``[ranks, T]`` bool each: row t goes to rank r.
        named: before and after the rule, ``[E]`` bool each: a row of any rank names expert e.
        owner: ``[E]`` int64, rank of every expert.
        rank: this one.
    """
    kept = [of[rank].sum() for of in visits]
    sent = [of.sum() - stays for of, stays in zip(visits, kept, strict=True)]
    ranks = visits[0].shape[0]
    reads = [
        torch.zeros(ranks, dtype=torch.int64, device=owner.device).index_add_(0, owner, of.long())
        for of in named
    ]
    rows = visits[1].any(dim=0).sum()
    return torch.stack(
        [rows, *sent, *kept, *(of.sum() for of in reads), *(of.max() for of in reads)]
    )


def mean_report(
    counts: Sequence[int], *, calls: int, ranks: int, row_bytes: Mapping[str, int]
) -> dict[str, Any]:
    """Sums of ``DISPATCH_COUNTS`` as bytes and means.

    Args:
        counts: sums over ``calls``.
        calls: layers x steps.
        ranks: size of the group.
        row_bytes: what one row takes on its way, ``{"dispatch": ..., "combine": ...}``.

    Returns:
        Per key with ``_before`` and ``_after``: ``rows_sent``, ``rows_kept``,
        ``bytes_dispatched`` and ``bytes_combined`` (to other ranks and back, without the header),
        ``destination_ranks_mean`` (per row, this rank among them), ``experts_read_mean`` (over
        ranks, layers and steps), ``experts_read_max_rank`` (the largest rank's, mean over layers
        and steps). None where nothing was counted.
    """
    of = dict(zip(DISPATCH_COUNTS, counts, strict=True))
    report: dict[str, Any] = {"rows": of["rows"]}
    for when in ("before", "after"):
        sent, kept = of[f"rows_sent_{when}"], of[f"rows_kept_{when}"]
        report |= {
            f"rows_sent_{when}": sent,
            f"rows_kept_{when}": kept,
            f"bytes_dispatched_{when}": sent * row_bytes["dispatch"],
            f"bytes_combined_{when}": sent * row_bytes["combine"],
            f"destination_ranks_mean_{when}": _mean(sent + kept, of["rows"]),
            f"experts_read_mean_{when}": _mean(of[f"experts_read_{when}"], calls * ranks),
            f"experts_read_max_rank_{when}": _mean(of[f"experts_read_max_{when}"], calls),
        }
    return report


def _mean(total: int, count: int) -> float | None:
    return total / count if count else None
