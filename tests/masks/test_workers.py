"""Several workers train the masks that one trains; EDiT, resumed and with workers that differ."""

import copy
import dataclasses
import time

import pytest
import torch

from sere_ray import assets
from sere_ray.calibration.loading import load_model
from sere_ray.masks.exchange import Exchange
from sere_ray.masks.plan import TrainSettings, prepare_training
from sere_ray.masks.train import artifact_of
from sere_ray.masks.training import Training
from sere_ray.masks.work_folder import WorkFolder
from sere_ray.util.errors import SereError
from tests.masks.conftest import SMALL
from tests.masks.threads import together

ONE = TrainSettings(**{**SMALL, "batch": 4, "knobs": (0.5, 1.0), "penalty": "batch"})
TWO = dataclasses.replace(ONE, workers=2)
EDIT = dataclasses.replace(TWO, sync="edit", sync_every=2, warm_up=2)
A_EDIT = dataclasses.replace(EDIT, sync="a-edit", sync_seconds=0.3)

ROUNDING = 2e-3
"""Of masks of about 0.1 after some steps of Adam, which divides small gradients by their size."""


def check_equal_but_rounding(found, expected):
    """Of the smallest gradients nothing but rounding is left, and Adam makes a whole step of that:
    one element in a thousand may be a step away."""
    off = (found - expected).abs()
    assert off.quantile(0.999) < ROUNDING
    assert off.max() < SMALL["learning_rate"]


@pytest.fixture(scope="module")
def model():
    return load_model(
        str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype=torch.float32
    )


@pytest.fixture
def train(model, tmp_path):
    """Runs a training in threads; gives the state of the first worker, and each one's object."""

    def run(settings, make=Training, name="masks"):
        plan = prepare_training(settings, tmp_path / name)
        work = WorkFolder(tmp_path / f"{name}.work", plan.identity())

        def worker(exchange):
            own = make(plan, copy.deepcopy(model), work.load(), work, exchange, None)
            own.run()
            return own

        if settings.workers == 1:
            workers = [worker(Exchange())]
        else:
            workers = together(settings.workers, worker)
        return work.load(), workers, plan

    return run


def masks(state):
    return {name: t for name, t in state.tensors.items() if name.startswith("done.")}


def check_equal(some, others):
    for row, other in zip(some.history, others.history, strict=True):
        # gathering what is saved counts, too
        assert {**row, "bytes_sent": 0} == {**other, "bytes_sent": 0}
    assert masks(some).keys() == masks(others).keys()
    for name, tensor in masks(others).items():
        assert torch.equal(masks(some)[name], tensor), name


def test_two_workers_train_what_one_does(train):
    one, _, _ = train(ONE, name="one")
    two, (first, second), plan = train(TWO, name="two")
    for name, tensor in masks(one).items():
        check_equal_but_rounding(masks(two)[name], tensor)
    for row, other in zip(two.history, one.history, strict=True):
        assert row["kl_mean"] == pytest.approx(other["kl_mean"], abs=1e-4)
        assert row["slots_kept_by_layer"] == pytest.approx(other["slots_kept_by_layer"], abs=2e-3)
        assert row["tokens"] == other["tokens"]
    assert one.history[-1]["bytes_sent"] == 0 < two.history[-1]["bytes_sent"]
    for i, router in first.model.routers.items():
        assert torch.equal(second.model.routers[i], router), "the same bits in both"
    assert len(artifact_of(plan, two).weights) == 2


def test_edit_trains_as_well_and_sends_less(train):
    together_, _, _ = train(TWO, name="together")
    alone, (first, second), _ = train(EDIT, name="alone")
    sent = [state.history[-1]["bytes_sent"] for state in (together_, alone)]
    assert sent[1] < 0.7 * sent[0], "two steps of eight together, then three meetings"
    for row, other in zip(alone.history, together_.history, strict=True):
        assert row["tokens"] == other["tokens"]
    last, expected = alone.history[-1], together_.history[-1]
    assert last["experts_kept"] == pytest.approx(expected["experts_kept"], abs=0.1)
    for i, router in first.model.routers.items():
        assert torch.equal(second.model.routers[i], router), "all have the same after a level"


class Killed(Exception):
    """Stands for a signal."""


def dies_at(number):
    class Dies(Training):
        steps = 0

        def train_on(self, unit, rate):
            self.steps += 1
            if self.steps == number:
                raise Killed  # both, as a worker without its peer waits for it
            super().train_on(unit, rate)

    return Dies


@pytest.mark.parametrize("settings", [TWO, EDIT], ids=["allreduce", "edit"])
def test_killed_workers_go_on_to_the_same_masks(settings, train, monkeypatch):
    expected, _, _ = train(settings, name="expected")
    monkeypatch.setattr(Training, "save_seconds", -1.0)

    for number in (2, 6, 9):  # in the warm-up, after a meeting, and in the second level
        with pytest.raises(Killed):
            train(settings, dies_at(number))
    found, _, _ = train(settings)
    check_equal(found, expected)


def test_fewer_workers_go_on_where_more_were(train, monkeypatch):
    expected, _, _ = train(ONE, name="expected")
    monkeypatch.setattr(Training, "save_seconds", -1.0)
    with pytest.raises(Killed):
        train(TWO, dies_at(6))
    found, _, _ = train(ONE)
    for name, tensor in masks(expected).items():
        check_equal_but_rounding(masks(found)[name], tensor)


def test_a_slow_worker_takes_less_and_every_window_counts_once(train):
    done = []

    class Uneven(Training):
        def train_on(self, unit, rate):
            done.append((self.exchange.rank, self.state.level, unit))
            super().train_on(unit, rate)
            time.sleep(0.3 * self.exchange.rank)

    settings = dataclasses.replace(A_EDIT, steps=12)
    state, _, _ = train(settings, Uneven)
    units = sorted((level, unit) for _, level, unit in done)
    assert units == [(level, unit) for level in range(2) for unit in range(2 * settings.steps)]
    slow = sum(rank for rank, _, _ in done)
    assert slow < len(done) / 2.5
    assert state.history[-1]["tokens"] == settings.steps * settings.batch_size * settings.length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 3}, "--workers = 3: each must have an equal part of --batch-size = 8"),
        ({"workers": 4}, "whole batches of --batch = 4 windows; give --batch-size 16"),
        ({"workers": 2, "balance": 0.1}, "--balance = 0.1: is a term of a whole step"),
        ({"sync": "edit"}, "--sync edit: is for several workers; give --workers"),
        ({"workers": 2, "sync_seconds": 0.0}, "--sync-seconds = 0.0: must be above 0"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(SereError) as caught:
        dataclasses.replace(ONE, **changes).check()
    assert message in str(caught.value)


def test_another_way_of_meeting_is_another_training(train):
    train(EDIT)
    for changes in ({"sync_every": 3}, {"sync": "allreduce"}, {"workers": 1, "sync": "allreduce"}):
        with pytest.raises(SereError, match=r"holds a training with .*; remove the folder"):
            train(dataclasses.replace(EDIT, **changes))
