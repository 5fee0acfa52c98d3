import pytest

from sere_ray import assets
from sere_ray.calibration import calibrate


@pytest.fixture(scope="session")
def similarity(tmp_path_factory):
    """Path of a small artifact of the demo model."""
    path = tmp_path_factory.mktemp("evaluation") / "demo.safetensors"
    text = str(assets.CALIBRATION)
    calibrate(str(assets.MODEL), data=text, out=path, sequences=16, device="cpu")
    return str(path)
