import pytest

from sere_ray import assets
from sere_ray.masks.plan import TrainSettings
from sere_ray.masks.train import train_masks
from tests.one_thread import one_thread

SMALL = {
    "model": str(assets.MODEL),
    "data": str(assets.CALIBRATION),
    "knobs": (0.5, 2.0),
    "steps": 8,
    "batch_size": 8,
    "batch": 8,
    "sequences": 32,
    "validation": 8,
    "length": 16,
    "learning_rate": 0.05,
    "penalty": "rows",
    "keep_first": False,
    "device": "cpu",
}
"""Enough to drop slots, in two seconds."""


@pytest.fixture(autouse=True)
def _few_threads():
    """For each test anew: an engine of another one sets what suits it."""
    one_thread()


@pytest.fixture
def trained(tmp_path):
    """Path of small masks of the demo model, and what training said."""
    path = tmp_path / "trained" / "demo.masks.safetensors"
    path.parent.mkdir()
    return path, train_masks(TrainSettings(**SMALL), path)
