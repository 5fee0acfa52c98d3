"""The vectorised simulation gives the ids of the reference, and counts by hand."""

import pytest
import torch

from sere_ray.bench.scale import (
    SHAPES,
    Arm,
    Shape,
    arms,
    count_reads_and_rows,
    draw_choices,
    points,
    random_similarity,
    reroute_ranks,
    simulate,
)
from sere_ray.rules import reroute


def reference(ids, similarity, arm, ranks):
    num_rows = len(ids)
    weights = torch.arange(ids.shape[1], 0, -1).float().expand(ids.shape)
    home = torch.arange(num_rows) * ranks // num_rows
    numbers = {
        "select_top_k": arm.select_top_k,
        "threshold": arm.threshold,
        "min_primary_experts": ids.shape[1],
    }
    whole = [torch.arange(num_rows)]
    parts = [(home == rank).nonzero().flatten() for rank in range(ranks)]
    new_ids = ids.clone()
    for rows in parts if arm.union == "local" else whole:
        new_ids[rows] = reroute(ids[rows], weights[rows], similarity, **numbers)
    return new_ids


@pytest.mark.parametrize("router", ["uniform", "skewed"])
@pytest.mark.parametrize(
    ("experts", "ranks", "rows"), [(16, 4, 1), (16, 2, 3), (32, 8, 2), (64, 16, 4), (128, 8, 16)]
)
def test_equals_the_reference(experts, ranks, rows, router):
    shape = Shape("small", experts, 8 if experts > 16 else 4, 64)
    every = [*arms(shape.top_k), Arm(3, "local", 0.4), Arm(1, "global", 0.2)]
    changed = 0
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        similarity = random_similarity(experts, generator)
        if seed % 2:  # ties
            similarity = (similarity * 8).round() / 8
        ids = draw_choices(shape, ranks * rows, router, seed, generator)
        for arm in every:
            new_ids = reroute_ranks(ids, similarity, arm, ranks=ranks)
            assert torch.equal(new_ids, reference(ids, similarity, arm, ranks)), (seed, arm)
            changed += int((new_ids != ids).sum())
    assert changed > 0


def test_counts_by_hand():
    """Two ranks of four experts, two rows each."""
    shape = Shape("tiny", 8, 2, 100)
    ids = torch.tensor([[0, 1], [0, 4], [0, 1], [5, 6]])
    new_ids = torch.tensor([[0, 0], [0, 4], [0, 4], [5, 5]])
    counts = count_reads_and_rows(ids, new_ids, shape, 2)
    assert counts["experts_read"] == 3  # 0, 4, 5
    assert counts["experts_read_mean"] == 1.5
    assert counts["experts_read_max_rank"] == 2
    assert counts["destination_ranks_mean"] == 0.5  # rows 1 and 2
    assert counts["rows_received_max_rank"] == 1
    assert counts["kib_per_row"] == 0.5 * (400 + 16) / 1024
    assert counts["slots_rerouted"] == 0.75


def test_a_union_over_all_reads_no_more():
    rows = simulate(SHAPES[0], "skewed", 8, 4)
    assert len({row["samples"] for row in rows}) == 1

    def row(**wanted):
        (found,) = [r for r in rows if all(r[name] == value for name, value in wanted.items())]
        return found

    stock = row(select_top_k=8)
    plain = {"select_top_k": 1, "threshold": None}
    one, local = row(**plain, union="global"), row(**plain, union="local")
    assert one["experts_read"] <= local["experts_read"] < stock["experts_read"]


def test_no_point_has_a_rank_without_experts():
    for shape, _, ranks, _ in points():
        assert shape.num_experts % ranks == 0
