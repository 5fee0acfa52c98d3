"""Dispatch and combine against a dense computation, in 2 to 4 gloo ranks."""

import pytest
import torch

from sere_ray.dispatch import DISPATCH_COUNTS, AllToAll, mean_report
from sere_ray.dispatch.all_to_all import merge_duplicates, pack, unpack
from sere_ray.dispatch.counts import any_flag, flag_words
from sere_ray.util.ports import free_port
from tests.dispatch.rank_pool import RankPool

HIDDEN, EXPERTS, TOP_K = 24, 37, 4
"""37 experts: two words of flags, and no number of ranks divides it."""
CASES = 40


@pytest.fixture(scope="module", params=[2, 3, 4])
def pool(request):
    pool = RankPool(request.param, free_port())
    yield pool
    pool.close()


# --- cases: the same on every rank, from a seed -------------------------------------------------


def placement(kind, ranks, generator):
    experts = torch.arange(EXPERTS)
    if kind == "linear":
        return experts * ranks // EXPERTS
    if kind == "round robin":
        return experts % ranks
    return torch.randint(0, ranks, (EXPERTS,), generator=generator)  # a rank may hold none


def make_rows(seed, ranks, dtype):
    """Per rank: hidden states, gate's ids, ids, weights; and a placement."""
    generator = torch.Generator().manual_seed(seed)

    def random(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    owner = placement(["linear", "round robin", "any"][seed % 3], ranks, generator)
    counts = random(0, 9, ranks).tolist()
    if seed % 7 == 0:
        counts = [0] * ranks
    if seed % 7 == 1:
        counts[seed % ranks] = 0
    if seed % 7 == 2:  # one rank has rows, the others are idle
        counts = [11 if rank == seed % ranks else 0 for rank in range(ranks)]
    rows = []
    for count in counts:
        gate_ids = random(0, EXPERTS, count, TOP_K)
        ids = gate_ids.clone()
        if seed % 5 == 1:  # all rows to one rank
            (of_rank,) = (owner == owner[seed % EXPERTS]).nonzero(as_tuple=True)
            ids = of_rank[random(0, len(of_rank), count, TOP_K)]
        if seed % 5 == 2:  # duplicates
            ids = random(0, 3, count, TOP_K)
        if seed % 5 in (2, 3):  # no expert
            ids[random(0, 3, count, TOP_K) == 0] = -1
            ids[: count // 3] = -1
        weights = torch.rand((count, TOP_K), generator=generator)
        hidden = torch.randn((count, HIDDEN), generator=generator).to(dtype)
        id_dtype = [torch.int32, torch.int64][seed % 2]
        rows.append((hidden, gate_ids.to(id_dtype), ids.to(id_dtype), weights))
    return owner, rows


def expert(number, hidden):
    """Expert ``number``: a different function of a row for each; float32."""
    return torch.tanh(hidden.float().roll(number, dims=-1)) * (1.0 + number / 7)


def dense(hidden, ids, weights, experts):
    """``[T, H]`` float32: the weighted sum over those slots whose expert is among ``experts``."""
    total = torch.zeros(hidden.shape, dtype=torch.float32)
    for number in experts:
        factor = (weights * (ids == number)).sum(dim=1, keepdim=True)
        total += expert(number, hidden) * factor
    return total


def dispatch_and_combine(ranks, seeds, dtype):
    """Checked in the process itself; returns counts."""
    report = []
    for seed in seeds:
        owner, rows = make_rows(seed, ranks.size, dtype)
        mine = (owner == ranks.rank).nonzero().flatten().tolist()
        exchange = AllToAll(owner, ranks.group, ranks.greeting)
        hidden, gate_ids, ids, weights = rows[ranks.rank]
        arrived, sent = exchange.dispatch(hidden, ids, weights, gate_ids)
        assert set(arrived.topk_ids.flatten().tolist()) <= {*mine, -1}
        assert bool(((arrived.topk_ids >= 0).sum(dim=1) >= 1).all()), "a row came for nothing"
        assert bool((arrived.topk_weights[arrived.topk_ids < 0] == 0).all())
        for row in arrived.topk_ids.tolist():
            named = [number for number in row if number >= 0]
            assert len(named) == len(set(named)), "duplicates were not merged"
        partial = dense(arrived.hidden_states, arrived.topk_ids, arrived.topk_weights, mine)
        combined = exchange.combine(partial.to(dtype), sent)
        assert combined.dtype == dtype
        assert torch.equal(combined, expected_sum(owner, ranks.size, hidden, ids, weights, dtype))
        again, sent_again = exchange.dispatch(hidden, ids, weights, gate_ids)
        assert all(torch.equal(a, b) for a, b in zip(arrived, again, strict=True))
        assert torch.equal(exchange.combine(partial.to(dtype), sent_again), combined)
        assert sent.received == recount_received(owner, rows, ranks.rank)
        report.append(sent.counts.tolist())
    return report


def expected_sum(owner, size, hidden, ids, weights, dtype):
    """Every rank's sum rounded to ``dtype`` for the way back, added in float32 in rank order."""
    merged_ids, merged = merge_duplicates(ids, weights, EXPERTS)
    total = torch.zeros(hidden.shape, dtype=torch.float32)
    for rank in range(size):
        there = (owner == rank).nonzero().flatten().tolist()
        total += dense(hidden, merged_ids, merged, there).to(dtype).float()
    assert torch.allclose(total, dense(hidden, ids, weights, range(EXPERTS)), atol=0.1, rtol=0.02)
    return total.to(dtype)


def recount_received(owner, rows, rank):
    return [
        sum(any(n >= 0 and owner[n] == rank for n in row) for row in ids.tolist())
        for _, _, ids, _ in rows
    ]


def recount(owner, rows, rank, size):
    """DISPATCH_COUNTS with sets."""

    def ranks_of(row):
        return {int(owner[number]) for number in row if number >= 0}

    found = dict.fromkeys(DISPATCH_COUNTS, 0)
    for when, column in (("before", 1), ("after", 2)):
        for row in rows[rank][column].tolist():
            found["rows"] += when == "after" and bool(ranks_of(row))
            found[f"rows_sent_{when}"] += len(ranks_of(row) - {rank})
            found[f"rows_kept_{when}"] += rank in ranks_of(row)
        named = {n for of in rows for row in of[column].tolist() for n in row if n >= 0}
        reads = [sum(int(owner[n]) == r for n in named) for r in range(size)]
        found[f"experts_read_{when}"] = sum(reads)
        found[f"experts_read_max_{when}"] = max(reads)
    return list(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_dense_computation_and_counts(pool, dtype):
    seeds = range(CASES)
    size = len(pool.processes)
    reports = pool.run(dispatch_and_combine, list(seeds), dtype)
    for seed in seeds:
        owner, rows = make_rows(seed, size, dtype)
        for rank in range(size):
            assert reports[rank][seed] == recount(owner, rows, rank, size), (seed, rank)


def compare_with_dense(ranks, seed):
    """In float32, of another order of adding: within rounding of the dense sum."""
    owner, rows = make_rows(seed, ranks.size, torch.float32)
    hidden, _, ids, weights = rows[ranks.rank]
    exchange = AllToAll(owner, ranks.group)
    arrived, sent = exchange.dispatch(hidden, ids, weights)
    mine = (owner == ranks.rank).nonzero().flatten().tolist()
    combined = exchange.combine(dense(*arrived, mine), sent)
    errors = (combined - dense(hidden, ids, weights, range(EXPERTS))).abs()
    return float(errors.max()) if errors.numel() else 0.0


def test_float32_is_within_rounding_of_the_dense_sum(pool):
    for seed in (3, 4, 6, 8, 12):
        assert max(pool.run(compare_with_dense, seed)) < 1e-5


def wrong_owner(ranks):
    try:
        AllToAll(torch.tensor([0, ranks.size]), ranks.group)
    except ValueError as error:
        return str(error)
    return None


def test_an_owner_outside_the_group_is_refused(pool):
    assert all("owner must hold ranks 0.." in answer for answer in pool.run(wrong_owner))


# --- parts, in this process -----------------------------------------------------------------------


def test_duplicates_are_merged_into_their_first_slot():
    ids = torch.tensor([[5, 2, 5, -1], [9, 9, 9, 9], [1, 2, 3, 40]])
    weights = torch.tensor([[0.5, 0.25, 0.125, 3.0], [1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4]])
    merged_ids, merged = merge_duplicates(ids, weights, EXPERTS)
    assert merged_ids.tolist() == [[5, 2, -1, -1], [9, -1, -1, -1], [1, 2, 3, -1]]
    assert merged.tolist() == [
        [0.625, 0.25, 0, 0],
        [10.0, 0, 0, 0],
        torch.tensor([0.1, 0.2, 0.3, 0]).tolist(),
    ]


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("width", [3, 24])
def test_packed_rows_come_back(rows, width):
    fields = (
        torch.randint(-1, 99, (rows, 4), dtype=torch.int32),
        torch.rand(rows, 4),
        torch.randn(rows, width).to(torch.bfloat16),
    )
    packed = pack(fields)
    assert packed.shape[1] % 16 == 0
    found = unpack(packed, tuple(field[:0] for field in fields))
    for field, back in zip(fields, found, strict=True):
        assert back.dtype == field.dtype
        assert back.is_contiguous()
        assert back.storage_offset() == 0
        assert torch.equal(back, field)


def test_row_bytes_are_those_of_the_packed_row():
    for width, dtype in ((24, torch.bfloat16), (3, torch.float32)):
        fields = (
            torch.zeros(1, 4, dtype=torch.int32),
            torch.zeros(1, 4),
            torch.zeros(1, width, dtype=dtype),
        )
        of_row = AllToAll.row_bytes(width, 4, dtype)
        assert of_row["dispatch"] == pack(fields).shape[1]
        assert of_row["combine"] == width * dtype.itemsize


@pytest.mark.parametrize("experts", [1, 31, 32, 128])
def test_flags_survive_packing(experts):
    flags = torch.rand(3, experts) < 0.3
    words = torch.stack([flag_words(row) for row in flags])
    assert words.dtype == torch.int32
    assert torch.equal(any_flag(words, experts), flags.any(dim=0))


def test_means_and_bytes_of_a_report():
    counts = [10, 12, 6, 8, 9, 40, 20, 12, 6]
    report = mean_report(counts, calls=5, ranks=4, row_bytes={"dispatch": 100, "combine": 10})
    assert report["bytes_dispatched_before"] == 1200
    assert report["bytes_combined_after"] == 60
    assert report["destination_ranks_mean_before"] == 2.0
    assert report["destination_ranks_mean_after"] == 1.5
    assert (report["experts_read_mean_after"], report["experts_read_max_rank_after"]) == (1.0, 1.2)
    empty = mean_report([0] * 9, calls=0, ranks=4, row_bytes={"dispatch": 1, "combine": 1})
    assert empty["destination_ranks_mean_after"] is None
