"""Copies chosen by experts read: against plain Python, and against the best there is."""

import itertools

import pytest
import torch

from sere_ray.rules.replicas import PASSES, UNREAD, by_tokens, choose_replicas, experts_of_ranks


def draw(seed, experts, redundant, ranks):
    """A map as vLLM keeps it: every expert once, some copied, dealt to slots of ranks."""
    generator = torch.Generator().manual_seed(seed)
    copied = torch.randint(experts, (redundant,), generator=generator)
    logical = torch.cat((torch.arange(experts), copied))
    logical = logical[torch.randperm(len(logical), generator=generator)]
    assert len(logical) % ranks == 0
    places = [(logical == e).nonzero().flatten().tolist() for e in range(experts)]
    widest = max(map(len, places))
    replicas = torch.tensor([p + [-1] * (widest - len(p)) for p in places])
    named = torch.rand(3, experts, generator=generator) < torch.tensor([[0.2], [0.5], [1.0]])
    return named, replicas, len(logical) // ranks


def plain(named, replicas, per_rank):
    copies = [[p for p in row if p >= 0] for row in replicas.tolist()]
    load, place = {}, {}

    def count(physical, by):
        load[physical // per_rank] = load.get(physical // per_rank, 0) + by

    wanted = [e for e, is_named in enumerate(named.tolist()) if is_named]
    for e in wanted:
        if len(copies[e]) == 1:
            place[e] = copies[e][0]
            count(place[e], 1)
    for _ in range(PASSES):
        for e in wanted:
            if len(copies[e]) == 1:
                continue
            if e in place:
                count(place[e], -1)
            least = min(load.get(p // per_rank, 0) for p in copies[e])
            best = [p for p in copies[e] if load.get(p // per_rank, 0) == least]
            place[e] = place[e] if place.get(e) in best else best[0]
            count(place[e], 1)
    return [place.get(e, UNREAD) for e in range(len(copies))]


def busiest(chosen, per_rank, physical):
    read = torch.zeros(physical, dtype=torch.bool)
    read[chosen[chosen >= 0]] = True
    return int(experts_of_ranks(read, per_rank=per_rank).max())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("experts", "redundant", "ranks"), [(12, 4, 4), (48, 16, 8), (64, 0, 4)])
def test_equals_plain_python(seed, experts, redundant, ranks):
    named, replicas, per_rank = draw(seed, experts, redundant, ranks)
    chosen = choose_replicas(named, replicas, per_rank=per_rank)
    assert chosen.tolist() == [plain(row, replicas, per_rank) for row in named]
    logical = torch.arange(experts)
    for row, is_named in zip(chosen, named, strict=True):
        assert (row >= 0).tolist() == is_named.tolist()
        copies = (replicas == row[:, None]) & is_named[:, None]
        assert logical[copies.any(dim=1)].tolist() == logical[is_named].tolist()


def test_nearly_the_best_there_is():
    """Of 200 small cases the busiest rank reads one more than it must in a few, never two."""
    found = {0: 0, 1: 0}
    for seed in range(200):
        (_, named, _), replicas, per_rank = draw(seed, 10, 6, 4)
        chosen = choose_replicas(named, replicas, per_rank=per_rank)
        choices = [[p for p in row if p >= 0] for row in replicas[named].tolist()]
        best = min(
            busiest(torch.tensor(choice, dtype=torch.long), per_rank, 16) if choice else 0
            for choice in itertools.product(*choices)
        )
        found[busiest(chosen, per_rank, 16) - best] += 1
    assert found[0] >= 190, found


def test_by_hand():
    """Ranks of two. Rank 0 reads expert 0 anyway, so the copied one is read from rank 1."""
    replicas = torch.tensor([[0, -1], [1, 2], [3, -1]])
    for named, expected in (
        ([True, True, False], [0, 2, -1]),
        ([False, True, True], [-1, 1, 3]),
        ([True, True, True], [0, 1, 3]),  # equal: the first copy
        ([False, False, False], [-1, -1, -1]),
    ):
        chosen = choose_replicas(torch.tensor(named), replicas, per_rank=2)
        assert chosen.tolist() == expected


def test_rows_are_hashed_as_vllm_does():
    replicas = torch.tensor([[5, 3, 1], [0, 2, -1], [4, -1, -1]])
    ids = torch.tensor([[0, 1], [2, 0], [1, 0], [0, 2]])
    physical = by_tokens(ids, replicas).tolist()
    for row, (own, mapped) in enumerate(zip(ids.tolist(), physical, strict=True)):
        hashed = row * 2654435769 & 0xFFFFFFFF
        for expert, found in zip(own, mapped, strict=True):
            copies = [p for p in replicas[expert].tolist() if p >= 0]
            assert found == copies[hashed % len(copies)]
