"""Send each row once to every rank that holds one of its experts, and bring back summed results.

Shapes: T rows of this rank, R rows that arrive here, H hidden size, K slots, E experts.

Three exchanges of ``torch.distributed.all_to_all_single`` a layer: a header (how many rows, which
experts are named), the rows, the results. Row counts differ from step to step and torch wants them
on the host, so on a GPU every layer waits once for its header: right in eager mode and between the
graphs of piecewise mode, impossible inside a captured graph.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sere_ray.dispatch.counts import any_flag, count_call, flag_words
from sere_ray.dispatch.missing_ranks import Greeting, naming_missing_ranks

_ALIGNMENT = 16
"""Bytes. A row that is sent starts at a multiple, so that a kernel may load it in large words."""


class Arrived(NamedTuple):
    """Rows that arrived to be computed here: by source rank, then in the order of that rank."""

    hidden_states: Tensor
    """``[R, H]``."""
    topk_ids: Tensor
    """``[R, K]`` int32, all of experts that live here; -1 = no expert."""
    topk_weights: Tensor
    """``[R, K]`` float32, 0 where there is no expert."""


class Sent(NamedTuple):
    """What :meth:`AllToAll.combine` needs to bring results back."""

    rows: Tensor
    """``[sum(sent)]`` int64: row of this rank, by destination."""
    sent: list[int]
    """How many rows went to each rank."""
    received: list[int]
    """How many rows came from each rank."""
    num_rows: int
    """T."""
    counts: Tensor
    """``[9]`` int64 on the device, in the order of ``DISPATCH_COUNTS``."""


@dataclass
class AllToAll:
    """Dispatch and combine for one placement of experts.

    Attributes:
        owner: ``[E]`` int64, rank of every expert (of every physical one, with a load balancer).
        group: of the ranks, gloo or NCCL; its timeout bounds every exchange.
        greeting: how to name ranks that are gone; None leaves torch's errors as they are.
    """

    owner: Tensor
    group: dist.ProcessGroup
    greeting: Greeting | None = None

    def __post_init__(self) -> None:
        """Check the placement.

        Raises:
            ValueError: an owner is not a rank of the group.
        """
        self.ranks, self.rank = self.group.size(), self.group.rank()
        if not bool(((self.owner >= 0) & (self.owner < self.ranks)).all()):
            raise ValueError(f"owner must hold ranks 0..{self.ranks - 1}: {self.owner.tolist()}")
        self.owner = self.owner.long()

    def dispatch(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        gate_ids: Tensor | None = None,
    ) -> tuple[Arrived, Sent]:
        """Send every row to the ranks of its experts; a collective call, also with T = 0.

        Args:
            hidden_states: ``[T, H]``, bf16, float16 or float32.
            topk_ids: ``[T, K]`` int32 or int64; outside 0..E-1 = no expert.
            topk_weights: ``[T, K]`` float.
            gate_ids: ``[T, K]``, ids before the rule, only to be counted; None = ``topk_ids``.

        Raises:
            MissingRankError: another rank is gone.
        """
        num_experts = self.owner.shape[0]
        ids, weights = merge_duplicates(topk_ids, topk_weights, num_experts)
        visits, named = self._visits(ids)
        before = (visits, named) if gate_ids is None else self._visits(gate_ids)
        sent, received, words = self._exchange_header(visits.sum(dim=1), before[1], named)
        counts = count_call(
            (before[0], visits),
            (any_flag(words[0], num_experts), any_flag(words[1], num_experts)),
            self.owner,
            self.rank,
        )
        where = torch.nonzero_static(visits, size=sum(sent))
        destinations, rows = where[:, 0], where[:, 1]
        is_there = self._owner_of(ids[rows]) == destinations.unsqueeze(1)
        fields = (
            ids[rows].masked_fill(~is_there, -1),
            weights[rows].masked_fill(~is_there, 0.0),
            hidden_states[rows],
        )
        arrived = self._exchange(pack(fields), sent, received)
        like = (ids[:0], weights[:0], hidden_states[:0])
        ids, weights, hidden_states = unpack(arrived, like)
        sent_rows = Sent(rows, sent, received, topk_ids.shape[0], counts)
        return Arrived(hidden_states, ids, weights), sent_rows

    def combine(self, partial: Tensor, sent: Sent) -> Tensor:
        """Bring results back and add those of each row, in rank order and in float32.

        Args:
            partial: ``[R, H]``, this rank's weighted sum for every row that arrived.
            sent: of :meth:`dispatch`.

        Returns:
            ``[T, H]`` of the dtype of ``partial``; zeros for a row without expert.

        Raises:
            MissingRankError: another rank is gone.
        """
        results = self._exchange(partial.contiguous(), sent.received, sent.sent)
        total = torch.zeros(
            (sent.num_rows, partial.shape[1]), dtype=torch.float32, device=partial.device
        )
        parts = zip(*(torch.split(t, sent.sent) for t in (sent.rows, results)), strict=True)
        for rows, result in parts:  # a row is there once for each rank: no order is left open
            total.index_add_(0, rows, result.float())
        return total.to(partial.dtype)

    @staticmethod
    def row_bytes(hidden_size: int, top_k: int, dtype: torch.dtype) -> dict[str, int]:
        """Bytes that one row takes: ``dispatch`` there, ``combine`` back."""
        there = hidden_size * dtype.itemsize + 8 * top_k
        return {
            "dispatch": -(-there // _ALIGNMENT) * _ALIGNMENT,
            "combine": hidden_size * dtype.itemsize,
        }

    def _owner_of(self, ids: Tensor) -> Tensor:
        """Rank of each slot's expert, -1 without one."""
        is_expert = (ids >= 0) & (ids < self.owner.shape[0])
        return self.owner[ids.long() * is_expert].masked_fill(~is_expert, -1)

    def _visits(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``[ranks, T]`` bool: row goes to rank; ``[E]`` bool: some row names the expert."""
        owners = self._owner_of(ids)
        ranks = torch.arange(self.ranks, device=ids.device)
        visits = (owners.unsqueeze(0) == ranks.view(-1, 1, 1)).any(dim=2)
        # Index E collects the slots without an expert.
        slots = torch.where(owners >= 0, ids.long(), self.owner.shape[0])
        named = torch.zeros(self.owner.shape[0] + 1, dtype=torch.bool, device=ids.device)
        named[slots.flatten()] = True
        return visits, named[:-1]

    def _exchange_header(
        self, rows: Tensor, before: Tensor, after: Tensor
    ) -> tuple[list[int], list[int], tuple[Tensor, Tensor]]:
        """Rows to and from every rank, and every rank's words of named experts."""
        words = torch.cat([flag_words(before), flag_words(after)])
        mine = torch.cat([rows.to(torch.int32).unsqueeze(1), words.expand(self.ranks, -1)], dim=1)
        theirs = self._exchange(mine, None, None)
        numbers = torch.stack([mine[:, 0], theirs[:, 0]]).tolist()  # the host waits here
        width = words.shape[0] // 2
        return numbers[0], numbers[1], (theirs[:, 1 : 1 + width], theirs[:, 1 + width :])

    def _exchange(self, rows: Tensor, sent: list[int] | None, received: list[int] | None) -> Tensor:
        count = rows.shape[0] if received is None else sum(received)
        arrived = rows.new_empty((count, *rows.shape[1:]))
        with naming_missing_ranks(self.group, self.greeting):
            dist.all_to_all_single(arrived, rows, received, sent, group=self.group)
        return arrived


def merge_duplicates(
    topk_ids: Tensor, topk_weights: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Give the first slot of an expert the weight of all slots of the row that name it.

    Returns:
        ``[T, K]`` int32 ids, -1 where nothing is left, and ``[T, K]`` float32 weights, 0 there.
    """
    ids, weights = topk_ids.to(torch.int32), topk_weights.float()
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    is_later = (same & same.new_ones(same.shape[1:]).tril(-1)).any(dim=2)
    dropped = is_later | (ids < 0) | (ids >= num_experts)
    merged = (weights.unsqueeze(1) * same).sum(dim=2)
    return ids.masked_fill(dropped, -1), merged.masked_fill(dropped, 0.0)


def pack(fields: tuple[Tensor, ...]) -> Tensor:
    """Fields of the same rows, ``[R, n]`` each, as ``[R, bytes]`` uint8: one exchange for all."""
    parts = [field.contiguous().view(torch.uint8) for field in fields]
    width = sum(part.shape[1] for part in parts)
    rows = fields[0].shape[0]
    padding = parts[0].new_zeros((rows, -width % _ALIGNMENT))
    return torch.cat([*parts, padding], dim=1)


def unpack(rows: Tensor, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The fields of :func:`pack`; ``like`` gives width and dtype of each."""
    fields, start = [], 0
    for field in like:
        stop = start + field.shape[1] * field.element_size()
        fields.append(
            rows[:, start:stop].clone(memory_format=torch.contiguous_format).view(field.dtype)
        )
        start = stop
    return tuple(fields)
