"""What every way of running ``reroute.cu`` must return: the integers of the reference."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sere_ray.kernel import alignment
from sere_ray.kernel.across_ranks import Placement
from sere_ray.kernel.alignment import Aligned
from sere_ray.kernel.launcher import RuleKernel
from sere_ray.kernel.limits import FILES, max_aligned_rows
from sere_ray.kernel.memory import (
    OWN_COUNTERS,
    STEP,
    DeviceLayer,
    LayerTables,
    Settings,
    StepInput,
)
from sere_ray.kernel.peers import Peers, inbox_words
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import PADDING, REROUTABLE, count, merge_repeated
from tests.rules.test_sere import Case, assert_same_ids, make_case

from .emulator import compile_for_cpu

KERNELS = Path(__file__).parents[2] / "kernels" / "cuda"
NO_LOGITS = (None, 0, None, 0, 0)
"""What launches under the rule ``sere`` take for those of a gate."""
Counts = tuple[int, ...]
Run = Callable[[Case], tuple[Tensor, Counts]]

# (E, K): of known models, the smallest, the largest, odd ones.
SHAPES = [(128, 8), (60, 4), (64, 6), (256, 8), (512, 10), (2, 1), (9, 3), (33, 16), (300, 5)]


def as_launched(case: Case) -> Case:
    """The case as the kernel takes it: contiguous, weights in float32."""

    def contiguous(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    return replace(
        case,
        ids=contiguous(case.ids),
        weights=contiguous(case.weights.float()),
        similarity=contiguous(case.similarity),
        row_kind=contiguous(case.row_kind),
    )


def policy(case: Case, mode: str = "on") -> BoundPolicy:
    return BoundPolicy(
        mode=mode,
        select_top_k=case.select_top_k,
        threshold=case.threshold,
        min_primary_experts=case.floor,
    )


def expected(case: Case) -> tuple[Tensor, Counts]:
    new = case.reroute()
    if not (case.kinds == REROUTABLE).any():
        return new, (0,) * OWN_COUNTERS  # steps without a decode row are not counted
    counts = count(case.rerouting(), case.ids, new, case.row_kind)
    return new, (*(int(number) for number in counts), 0, 0)


def merged(case: Case) -> tuple[Tensor, Tensor, int]:
    """Where experts' code skips ids of -1: ids, weights, and slots that others took over."""
    new = case.reroute()
    if case.is_identity:
        return new, case.weights, 0
    ids, weights = merge_repeated(new, case.weights, row_kind=case.kinds, num_experts=case.experts)
    return ids, weights, int((ids != new).sum())


def check(run: Run, case: Case) -> None:
    case = as_launched(case)
    ids, counts = run(case)
    expected_ids, expected_counts = expected(case)
    assert_same_ids(ids, expected_ids, "kernel")
    assert counts == expected_counts


def device_layer(
    case: Case,
    device: torch.device,
    mode: str = "on",
    counters: Tensor | None = None,
    own: range | None = None,
    reroutable: int | None = None,
    merges: bool = False,
) -> DeviceLayer:
    """Everything of a case but its ids and weights, where a launch reads and writes it."""
    settings = Settings(device, merges=merges)
    settings.write(policy(case, mode), top_k=case.slots, num_experts=case.experts)
    step = StepInput(max(case.ids.shape[0], 1), device)
    step.write(case.kinds.numpy(), counter_row=1, own=own, reroutable=reroutable)
    if counters is None:
        counters = torch.zeros((2, OWN_COUNTERS), dtype=torch.int64, device=device)
    tables = LayerTables.build(case.similarity, device)
    return DeviceLayer(tables, settings.buffer[0], step, counters)


@functools.cache
def library(
    kernel: RuleKernel, name: str, threads: int, cache: Path, rank: int | None = None
) -> object:
    """A kernel compiled for the emulator; one that waits for another rank has a copy of its own."""
    defines = kernel.defines(name, threads) | ({} if rank is None else {"RANK_ON_CPU": rank})
    return compile_for_cpu(KERNELS / FILES[name], defines, cache)


def peers_on(device: torch.device, experts: int, ranks: int) -> list[Peers]:
    """Ranks of this process that reach each other's inboxes."""
    words = inbox_words(experts, ranks)
    memory = [torch.zeros(words, dtype=torch.int64, device=device) for _ in range(ranks)]
    inboxes = torch.tensor([inbox.data_ptr() for inbox in memory], device=device)
    return [
        Peers(
            inboxes=inboxes,
            number=torch.zeros(1, dtype=torch.int32, device=device),
            rank=rank,
            patience_ns=20 * 10**9,
            memory=memory,
        )
        for rank in range(ranks)
    ]


def rule_arguments(
    ids: Tensor,
    new_ids: Tensor,
    weights: Tensor,
    layer: DeviceLayer,
) -> tuple[object, ...]:
    """What every kernel takes first, for the emulator, which checks the bounds of tensors."""
    return (
        ids,
        new_ids,
        weights,
        ids.shape[0],
        layer.tables.neighbours,
        layer.tables.similarity,
        layer.tables.stand_ins,
        layer.tables.stand_in_of,
        layer.settings,
        layer.step.buffer,
        layer.step.buffer[STEP.size :],
        layer.counters,
        layer.counters.stride(0),
    )


def kernel_of(case: Case) -> RuleKernel:
    return RuleKernel(case.experts, case.slots, case.ids.dtype)


def empty_alignment(
    kernel: RuleKernel, ids: Tensor, block: int, experts: int | None = None
) -> tuple[Aligned, list[object]]:
    """Buffers of the size the launcher gives them, filled with -7, and the emulator's arguments."""
    most_rows = max_aligned_rows(kernel.num_experts, kernel.top_k)
    aligned, _ = alignment.empty_alignment(ids, block, experts or kernel.num_experts, most_rows)
    for tensor in aligned:
        tensor.fill_(-7)
    bits, capacity = block.bit_length() - 1, aligned.sorted_slots.numel()
    return aligned, [bits, aligned.sorted_slots, capacity, *aligned[1:]]


def check_aligned(new_ids: Tensor, aligned: Aligned, block: int, experts: int) -> None:
    """Every valid slot once, in a block of its expert; whole blocks; experts in order."""
    sorted_slots, block_expert, used_length = (tensor.cpu() for tensor in aligned)
    padded = int(used_length)
    slots = new_ids.numel()
    flat = new_ids.flatten().long().numpy()
    used = sorted_slots[:padded].numpy()
    assert padded % block == 0
    owner = np.repeat(block_expert[: padded // block].numpy(), block)
    real = used < slots
    assert (flat[used[real]] == owner[real]).all()
    valid = np.flatnonzero((flat >= 0) & (flat < experts))
    assert sorted(used[real].tolist()) == valid.tolist()
    needed = sum(-(-int(n) // block) for n in np.unique(flat[valid], return_counts=True)[1])
    assert padded == needed * block
    assert (np.diff(block_expert[: padded // block].numpy()) >= 0).all()


def odd_cases(experts: int, slots: int) -> list[Case]:
    """Cases that random ones may miss."""
    common = {"experts": experts, "slots": slots, "select_top_k": 1, "seed": 5}
    return [
        make_case(rows=0, **common),
        make_case(rows=1, **common),
        make_case(rows=17, kinds="padding", **common),
        make_case(rows=17, kinds="exact", **common),
        make_case(rows=130, kinds="mixed", id_dtype=torch.int32, **common),
        make_case(rows=600, kinds="decode", floor=slots, **common),
        make_case(rows=5, threshold="entry", **common),
        make_case(rows=5, kinds="padding", **common),
        make_case(rows=64, gate=slots <= experts, tied=False, id_dtype=torch.int32, **common),
    ]


# --- rows of two ranks ----------------------------------------------------------------------------


def two_ranks(case: Case, split: float, round_robin: bool) -> list[tuple[range, Placement]]:
    """For each of two ranks the rows that are its own, and where experts are."""
    rows, experts = case.ids.shape[0], case.experts
    first = round(split * rows)
    numbers = torch.arange(experts)
    owner = numbers % 2 if round_robin else (numbers >= (experts + 1) // 2).long()
    found = []
    for rank, own in enumerate((range(first), range(first, rows))):
        mine = owner == rank
        local_ids = torch.where(mine, mine.cumsum(0) - 1, -1).int()
        found.append((own, Placement(local_ids, owner.to(torch.uint8), 2)))
    return found


def rows_of(case: Case, own: range) -> Case:
    """The case of a rank that sees its own rows only."""
    rows = slice(own.start, own.stop)
    kinds = None if case.row_kind is None else case.row_kind[rows].contiguous()
    ids, weights = case.ids[rows].contiguous(), case.weights[rows].contiguous()
    return replace(case, ids=ids, weights=weights, row_kind=kinds)


def split_up(
    case: Case, owned: list[range], device: torch.device
) -> tuple[list[Case], list[DeviceLayer], list[Tensor], list[Tensor]]:
    """Of each rank: its rows as a case, its layer, and its ids and weights on the device."""
    reroutable = int((case.kinds == REROUTABLE).sum())
    parts = [rows_of(case, own) for own in owned]
    layers = [device_layer(part, device, reroutable=reroutable) for part in parts]
    ids = [part.ids.to(device, copy=True) for part in parts]
    return parts, layers, ids, [part.weights.to(device) for part in parts]


def check_split(
    case: Case, owned: list[range], ids: list[Tensor], layers: list[DeviceLayer]
) -> None:
    """Each rank has its rows of the reference's ids, the counts of all, and its own slots."""
    new, counts = expected(case)
    slots = 0
    for own, of_rank, layer in zip(owned, ids, layers, strict=True):
        assert_same_ids(of_rank.cpu(), new[own.start : own.stop], "kernel")
        before, after, changed, critical, _, _ = layer.counters[1].tolist()
        assert (before, after, critical) == (counts[0], counts[1], counts[3])
        slots += changed
    assert slots == counts[2]


def own_slots(case: Case, new_ids: Tensor, own: range) -> int:
    """Slots that changed in the rows of a rank."""
    rows = slice(own.start, own.stop)
    changed = (case.ids != new_ids)[rows] & (case.kinds != PADDING)[rows, None]
    return int(changed.sum()) if (case.kinds == REROUTABLE).any() else 0


def busiest(case: Case, new_ids: Tensor, placement: Placement) -> list[int]:
    """Experts that the rank which reads the most reads, before and after the rule."""
    found = []
    for ids in (case.ids, new_ids):
        named = ids[case.kinds != PADDING].flatten().long()
        named = named[(named >= 0) & (named < case.experts)].unique()
        found.append(int(placement.owner.long()[named].bincount(minlength=2).max()))
    return found


def check_local_alignment(new_ids: Tensor, aligned: Aligned, block: int, local_ids: Tensor) -> None:
    """As :func:`check_aligned`, of one rank's experts under the names it gives them."""
    experts = local_ids.shape[0]
    ids = new_ids.cpu().long()
    valid = (ids >= 0) & (ids < experts)
    local = torch.where(valid, local_ids.cpu().long()[ids.clamp(0, experts - 1)], -1)
    check_aligned(local, aligned, block, experts)
