"""What `sere-ray bench busiest-rank` measures and compares."""

import json

import pytest

from sere_ray import assets
from sere_ray.bench.busiest_rank import batches_of, compare, demo_with


def rows(choice, points):
    about = {"model": "demo", "ranks": 4, "batch": 16, "choice": choice}
    return [about | {"experts_max_rank": reads, "kl_mean": kl} for reads, kl in points]


def test_choices_are_compared_where_they_are_as_far_from_exact():
    """At KL 0.01 halfway (in its logarithm) between two strengths of each."""
    alone = rows("margin", [(8.0, 0.001), (4.0, 0.1)])
    found = compare(alone + rows("balance_ranks", [(6.0, 0.001), (3.0, 0.1)]))
    (at,) = [row for row in found if row["kl"] == 0.01]
    assert at["experts_max_rank_of_margin"] == pytest.approx(6.0)
    assert at["experts_max_rank"] == pytest.approx(4.5)
    assert at["fewer"] == 0.25


def test_nothing_is_said_where_one_does_not_reach():
    alone = rows("margin", [(8.0, 0.001), (4.0, 0.1)])
    found = compare(alone + rows("balance_ranks", [(6.0, 0.001), (5.0, 0.005)]))
    assert [row["kl"] for row in found] == [0.003]


def test_steps_have_rows_for_every_rank():
    assert batches_of(4) == [16, 64]
    assert batches_of(8) == [16, 32]


def test_the_same_weights_with_more_experts_a_row():
    with demo_with(4) as folder:
        assert folder == str(assets.MODEL)
    with demo_with(8) as folder, open(f"{folder}/config.json") as file:
        assert json.load(file) == {**assets.model_config(), "num_experts_per_tok": 8}
