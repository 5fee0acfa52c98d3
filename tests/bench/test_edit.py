"""Faults of the benchmark of EDiT strike where they should."""

import copy

import pytest
import torch

from sere_ray import assets
from sere_ray.bench import edit
from sere_ray.calibration.loading import load_model
from sere_ray.masks.plan import TrainSettings, prepare_training
from sere_ray.masks.work_folder import WorkFolder
from tests.masks.threads import together
from tests.one_thread import one_thread

SETTINGS = TrainSettings(
    str(assets.MODEL),
    str(assets.CALIBRATION),
    knobs=(0.1,),
    steps=40,
    batch_size=8,
    batch=4,
    sequences=128,
    validation=8,
    length=32,
    workers=2,
    sync="edit",
    sync_every=3,
    warm_up=10,
)


def test_garbage_of_one_worker_is_left_out(tmp_path):
    """Random tokens and a far too large loss for two steps of forty, and at no other."""
    one_thread()
    model = load_model(
        str(assets.MODEL), revision=None, device=torch.device("cpu"), dtype=torch.float32
    )
    plan = prepare_training(SETTINGS, tmp_path / "masks")
    work = WorkFolder(tmp_path / "masks.work", plan.identity())
    fed = set()

    class Seen(edit.Garbage):
        def windows_of(self, unit):
            windows = super().windows_of(unit)
            if not torch.equal(windows, self.plan.windows_of_unit(0, unit)):
                fed.add((self.exchange.rank, unit // 2))
            return windows

    def worker(exchange):
        own = Seen(plan, copy.deepcopy(model), work.load(), work, exchange, None)
        own.run()
        return own.left_out

    assert together(2, worker)[0] > 0
    assert fed == {(1, 28), (1, 29)}
    job = edit.Job(plan, work)
    row = edit._row("edit", "garbage", 0, job)
    assert row["tokens"] == 40 * 8 * 32
    assert row["objective"] == pytest.approx(row["validation_kl"] + 0.1 * row["experts_kept"])
    summary = edit._summary(
        [row | {"method": m, "fault": f} for m in edit.METHODS for f in edit.FAULTS]
    )
    assert {entry["validation_kl"] for entry in summary} == {row["validation_kl"]}
