"""A meeting of EDiT: who is left out, what counts how much, and what all have afterwards."""

import pytest
import torch
from torch.nn import Parameter

from sere_ray.masks import edit
from sere_ray.masks.edit import Edit, Norms, weights_of
from tests.masks.threads import together

LAYERS = (0, 2)
SHAPE = (6, 5)


def normal(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_spike_is_an_outlier_and_usual_norms_are_none():
    norms, draw = Norms(2), torch.Generator().manual_seed(0)
    for _ in range(200):
        usual = 0.3 + 0.02 * torch.randn(2, generator=draw, dtype=torch.float64)
        assert not norms.judge(usual).any()
    seen, mean, variance = norms.table.clone()
    assert seen.tolist() == [200, 200]
    assert mean == pytest.approx([0.3, 0.3], abs=0.02)
    assert variance.sqrt() == pytest.approx([0.02, 0.02], abs=0.01)
    assert norms.judge(normal(0.3, 0.9)).tolist() == [False, True]
    assert norms.judge(normal(0.3, float("nan"))).tolist() == [False, True]
    assert norms.judge(normal(0.0, 0.3)).tolist() == [False, False], "one that made no step"
    assert norms.table[1].tolist() == pytest.approx(mean.tolist(), abs=0.003), "it moves little"
    assert norms.table[0].tolist() == [202, 202]


def test_no_finite_norm_is_an_outlier_before_some_were_seen():
    norms = Norms(1)
    for value in (0.3, 9.0, 0.3):
        assert not norms.judge(normal(value)).any()


def test_weights():
    none, steps = torch.tensor([False] * 3), normal(10, 10, 10)
    equal = weights_of(normal(0.3, 0.3, 0.3), none, steps, 0.0)
    assert equal.tolist() == pytest.approx([1 / 3] * 3)
    quiet, loud, out = weights_of(
        normal(0.0, 1.0, 5.0), torch.tensor([False, False, True]), steps, 0.0
    ).tolist()
    assert (quiet / loud, out) == (pytest.approx(torch.e), 0)
    mixed = weights_of(normal(0.3, 0.3, 0.3), none, normal(20, 10, 0), 0.5)
    assert mixed.tolist() == pytest.approx([1 / 6 + 1 / 3, 1 / 6 + 1 / 6, 1 / 6])
    assert not weights_of(normal(1, 1, 1), ~none, steps, 0.5).any()


def meetings(deltas, workers=2):
    """Routers after meetings, by worker: ``deltas[meeting][rank]`` is added by 10 steps at 0.01."""

    def work(exchange):
        routers = {i: Parameter(torch.ones(SHAPE)) for i in LAYERS}
        own = Edit(routers, exchange, 0.0)
        for of_workers in deltas:
            with torch.no_grad():
                for router in routers.values():
                    router -= of_workers[exchange.rank]
            met = own.meet(10, 0.1, save=exchange.rank == 0)
            left_out = met.left_out
            assert met.steps == [10] * workers
            assert met.save
            own.settle(LAYERS[0])
            own.settle(LAYERS[0])  # does nothing
            own.settle_all()
        return {i: router.detach().clone() for i, router in routers.items()}, own, left_out

    return together(workers, work)


def test_equal_workers_are_averaged_and_stepped_with_nesterov():
    results = meetings([(0.02, 0.04), (0.02, 0.04)])
    last, momentum = 1.0, 0.0
    weights = torch.tensor([-0.2, -0.4]).softmax(0)  # norms in units of the rates, 0.1
    mean = float(weights @ torch.tensor([0.02, 0.04]))
    for meeting in range(2):
        momentum = mean if meeting == 0 else edit.OUTER_MOMENTUM * momentum + mean
        last -= edit.OUTER_RATE * (mean + edit.OUTER_MOMENTUM * momentum)
    for routers, *_ in results:
        for i in LAYERS:
            torch.testing.assert_close(routers[i], torch.full(SHAPE, last))
            assert torch.equal(routers[i], results[0][0][i]), "the same bits for all"


def test_a_large_mean_is_clipped():
    for routers, *_ in meetings([(7.0, 7.0)]):
        factor = edit.OUTER_RATE * (1 + edit.OUTER_MOMENTUM)
        moved = edit.MOST_NORM * 0.1 * factor
        torch.testing.assert_close(routers[0], torch.full(SHAPE, 1 - moved))


@pytest.mark.parametrize("spike", [5.0, float("nan")])
def test_a_spike_changes_nothing(spike):
    usual = [(0.02, 0.02)] * 6
    (routers, _, left_out), _ = meetings([*usual, (0.02, spike)])
    (expected, *_), _ = meetings([*usual, (0.02, 0.02)])
    for i in LAYERS:
        torch.testing.assert_close(routers[i], expected[i])
    assert left_out == len(LAYERS)


def test_where_all_are_left_out_nothing_moves():
    (routers, *_), _ = meetings([(float("inf"), float("nan"))])
    for i in LAYERS:
        assert torch.equal(routers[i], torch.ones(SHAPE))


def test_saved_and_restored():
    deltas = [(0.02, 0.04), (0.03, 0.01), (0.02, 0.02)]
    (expected, *_), _ = meetings(deltas)
    (before, own, _), _ = meetings(deltas[:2])
    saved = {name: tensor.clone() for name, tensor in own.tensors().items()}

    def work(exchange):
        routers = {i: Parameter(before[i].clone()) for i in LAYERS}
        again = Edit(routers, exchange, 0.0)
        again.restore(saved)
        with torch.no_grad():
            for router in routers.values():
                router -= deltas[2][exchange.rank]
        again.meet(10, 0.1, save=False)
        again.settle_all()
        return routers

    for routers in together(2, work):
        assert all(torch.equal(routers[i], expected[i]) for i in LAYERS)
