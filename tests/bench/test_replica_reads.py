"""What `sere-ray bench replicas` counts, on ids by hand and on drawn ones."""

import torch

from sere_ray.bench.replica_reads import Ids, busiest_of, copies_of, count_reads


def test_reads_of_the_busiest_rank_by_hand():
    """Two ranks of three: expert 0 lies on both. Rows of either rank name it."""
    placed = torch.tensor([0, 1, 2, 0, 3, 4])
    assert copies_of(placed, 5).tolist() == [[0, 3], [1, -1], [2, -1], [4, -1], [5, -1]]
    steps = torch.tensor(
        [[[[0, 1], [0, 2]], [[0, 3], [0, 1]]], [[[0, 3], [4, 0]], [[3, 4], [4, 3]]]]
    )
    found = busiest_of(steps, placed, 5, ranks=2)
    # Step 0 names 0, 1, 2, 3: 1 and 2 lie on rank 0, so 0 is read from rank 1. By rows, two rows of
    # a rank get other copies. Step 1 names 0, 3, 4.
    assert found["by_experts"].tolist() == [2, 2]
    assert found["by_tokens"].tolist() == [3, 3]


def test_copies_by_experts_are_never_read_more_than_by_rows():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(8, 32, 16, generator=generator).topk(2).indices for _ in range(3)]
    row = count_reads(Ids("drawn", "none", 16, layers), ranks=4, redundant=4, rows_per_rank=4)
    assert row["experts_max_rank"] < row["experts_max_rank_by_tokens"]
    assert row["fewer"] == round(1 - row["experts_max_rank"] / row["experts_max_rank_by_tokens"], 3)
