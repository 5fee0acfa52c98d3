"""``replicas.cu``, run on the CPU: the integers of ``rules/replicas.py``, and vLLM's counts."""

import pytest
import torch

from sere_ray.kernel import replicas as launches
from sere_ray.kernel.launcher import RuleKernel
from sere_ray.rules import replicas as reference
from sere_ray.rules.common import named_by
from tests.rules.test_replicas import draw

from .emulator import COMPILER, launch
from .kernel_cases import library

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernel with")

SHAPES = [(48, 4, 16, 8), (128, 8, 32, 8), (60, 4, 12, 3), (300, 5, 60, 9), (9, 3, 27, 4)]


def run(ids, read, copies, per_rank, *, records=True, unpadded, seed, cache, threads=64):
    """Physical ids of a launch, and what the balancer counted."""
    kernel = RuleKernel(len(copies), ids.shape[1], ids.dtype)
    physical = torch.full_like(ids, -7)
    load = torch.zeros(int(copies.max()) + 1, dtype=torch.int32)
    launch(
        library(kernel, "map_to_copies", threads, cache),
        "map_to_copies",
        ids,
        physical,
        len(ids),
        read,
        copies,
        copies.shape[1],
        (copies >= 0).sum(dim=1),
        per_rank,
        len(load),
        load,
        torch.tensor(records),
        torch.tensor(unpadded, dtype=torch.int32),
        threads=threads,
        seed=seed,
    )
    return physical, load


def expected(ids, read, copies, per_rank):
    """By the reference; experts that nobody is said to name by the row."""
    valid = (ids >= 0) & (ids < len(copies))
    logical = torch.where(valid, ids, 0).long()
    chosen = reference.choose_replicas(read.bool(), copies, per_rank=per_rank)[logical]
    hashed = reference.by_tokens(logical, copies)
    return torch.where(valid, torch.where(chosen >= 0, chosen, hashed), -1).to(ids.dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, cache):
    experts, slots, redundant, ranks = shape
    for seed in range(12):
        _, copies, per_rank = draw(seed, experts, redundant, ranks)
        generator = torch.Generator().manual_seed(seed)
        rows = (0, 1, 7, 40)[seed % 4]
        ids = torch.rand(rows, experts, generator=generator).topk(slots).indices
        ids[torch.rand(ids.shape, generator=generator) < 0.05] = -1
        ids = ids.to((torch.int32, torch.int64)[seed % 2])
        everybody = torch.ones(rows, dtype=torch.bool)
        read = named_by(ids, everybody, experts)  # and what other ranks name
        read |= torch.rand(experts, generator=generator) < 0.3
        if seed % 5 == 4:  # a step of which nothing is known
            read[:] = False
        unpadded = rows // 2 if seed % 3 == 2 else rows
        options = {"unpadded": unpadded, "seed": seed % 4, "cache": cache}
        physical, load = run(ids, read.to(torch.uint8), copies, per_rank, **options)
        assert torch.equal(physical, expected(ids, read, copies, per_rank))
        counted = physical[:unpadded].flatten().long()
        assert torch.equal(load, counted[counted >= 0].bincount(minlength=len(load)).int())


@pytest.mark.parametrize("threads", [512, 1024])
def test_block_sizes_as_launched(threads, cache):
    _, copies, per_rank = draw(1, 128, 32, 8)
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(launches.MAX_ROWS, 128, generator=generator).topk(8).indices.int()
    read = torch.ones(128, dtype=torch.uint8)
    options = {"unpadded": len(ids), "seed": 2, "cache": cache, "threads": threads}
    physical, load = run(ids, read, copies, per_rank, records=False, **options)
    assert torch.equal(physical, expected(ids, read, copies, per_rank))
    assert not load.any()


def test_every_expert_is_read_from_one_copy(cache):
    """So no rank reads what another one reads; by rows they do."""
    _, copies, per_rank = draw(3, 48, 16, 8)
    ids = torch.rand(64, 48, generator=torch.Generator().manual_seed(3)).topk(4).indices
    read = torch.ones(48, dtype=torch.uint8)
    physical, _ = run(ids, read, copies, per_rank, unpadded=64, seed=0, cache=cache)
    assert (
        len(physical.unique()) == len(ids.unique()) < len(reference.by_tokens(ids, copies).unique())
    )
