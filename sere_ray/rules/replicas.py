"""Which copy of an expert is read where a load balancer keeps several, on several ranks.

A decode step waits for memory, not for arithmetic: a rank's time grows with the experts that it
reads, hardly with the rows that come to each. Choosing copies so that rows are balanced, as vLLM's
load balancer does by a hash of the row, reads every copy of an expert that several rows named. So
each expert that is named is read from one copy (a second one would only add to what is read), and
from the one whose rank reads the fewest: METRO (arXiv 2512.09277).

Nothing is lost by it: copies have the same weights. If ranks did not agree, answers would still be
right, and only more experts would be read.
"""

import torch
from torch import Tensor

PASSES = 2
"""How often the experts with several copies are gone through: the first time they are placed, then
they may move. A third time changed nothing on average in any random map that was tried."""
MOST_COPIES = 8
"""Copies of an expert that are looked at; a kernel has room for so many."""
UNREAD = -1


def choose_replicas(named: Tensor, replicas: Tensor, *, per_rank: int) -> Tensor:
    """``[..., E]`` int64: the physical expert that is read for each logical one, or ``UNREAD``.

    Experts with one copy count for its rank. Then, by index, each other expert that is named goes
    to the copy whose rank reads the fewest so far; of equal ones the first in its row. In later
    passes an expert moves where another rank would read fewer with it than its own does; then what
    it leaves is at most one above what it joins. Integers alone: the same on every rank.

    Args:
        named: ``[..., E]`` bool, by a row of any rank.
        replicas: ``[E, R]`` int64, physical ids of each expert's copies, then -1:
            ``logical_to_physical_map`` of vLLM. Every expert has one.
        per_rank: physical experts of a rank; those of rank r begin at ``r * per_rank``.
    """
    replicas = replicas[:, :MOST_COPIES]
    rank_of = torch.where(replicas >= 0, replicas // per_rank, -1)
    num_ranks = int(rank_of.max()) + 1
    several = (replicas >= 0).sum(dim=-1) > 1
    place = torch.where(named & ~several, 0, UNREAD)  # which of its copies
    load = torch.zeros((*named.shape[:-1], num_ranks), dtype=torch.int64, device=named.device)
    load.scatter_add_(-1, rank_of[:, 0].expand_as(place), (place >= 0).long())
    for _ in range(PASSES):
        for expert in several.nonzero().flatten().tolist():
            _place(place, load, named, rank_of[expert], expert)
    taken = replicas.expand(*named.shape, -1).gather(-1, place.clamp(min=0)[..., None])[..., 0]
    return torch.where(place >= 0, taken, UNREAD)


def _place(place: Tensor, load: Tensor, named: Tensor, ranks: Tensor, expert: int) -> None:
    """Give an expert the copy of the least loaded rank, in place; of equal ones its own stays."""
    is_named, own = named[..., expert], place[..., expert]
    copies = ranks[ranks >= 0]
    index = torch.arange(len(copies), device=load.device)
    is_own = own[..., None] == index
    # Twice the load without this expert, and one more for every copy but its own.
    worth = 2 * (load[..., copies] - is_own.long()) + (~is_own).long()
    best = worth.argmin(dim=-1)  # the first of equal ones
    load.scatter_add_(-1, copies.expand_as(worth), -is_own.long())
    place[..., expert] = torch.where(is_named, best, UNREAD)
    load.scatter_add_(-1, copies[best][..., None], is_named.long()[..., None])


def experts_of_ranks(read: Tensor, *, per_rank: int) -> Tensor:
    """``[..., ranks]`` int64: physical experts that each rank reads, of ``read [..., P]`` bool."""
    return read.reshape(*read.shape[:-1], -1, per_rank).sum(dim=-1)


def by_tokens(topk_ids: Tensor, replicas: Tensor) -> Tensor:
    """``[..., T, K]`` int64 physical ids as vLLM's load balancer chooses them: by a hash of a row.

    Args:
        topk_ids: ``[..., T, K]`` int64 logical ids of one rank's rows, all valid.
        replicas: as of :func:`choose_replicas`.
    """
    row = torch.arange(topk_ids.shape[-2], device=topk_ids.device)[:, None] * _HASH % 2**32
    count = (replicas >= 0).sum(dim=-1)[topk_ids]
    return replicas[topk_ids].gather(-1, (row % count)[..., None])[..., 0]


_HASH = 2654435769
"""vLLM's ``_eplb_map_and_record_i32_kernel``: 2^32 over the golden ratio."""
