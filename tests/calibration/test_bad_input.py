"""What the command refuses: message, exit code 2, and a file that is there stays as it is.

What ends a job half way, and how it is resumed: test_ray_job.py.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Qwen3Config
from typer.testing import CliRunner

from sere_ray import assets
from sere_ray.calibration.plan import only_writer
from sere_ray.cli.main import app
from tests.calibration.test_streamed import two_files

DEMO = str(assets.MODEL)
WAYS = ([], ["--layer-streamed"], ["--ray"])


def check_refused(way: list[str], model: str, out: Path, message: str, *options: str) -> None:
    """Run the command where a file is already there."""
    out.write_bytes(b"of an earlier calibration")
    before = sorted(out.parent.iterdir())
    command = ["calibrate", model, "--data", str(assets.CALIBRATION), "--out", str(out)]
    result = CliRunner().invoke(app, [*command, *options, *way])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(out.parent.iterdir()) == before
    assert out.read_bytes() == b"of an earlier calibration"


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-column", "body"], "no column 'body'; it has 'text', 'kind'; choose one"),
        (["--sequences", "1000000"], "sequences = 1000000; give more text"),
    ],
)
def test_unfit_data(way: list[str], options: list[str], message: str, tmp_path: Path) -> None:
    check_refused(way, DEMO, tmp_path / "a", message, *options)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_missing_shard(way: list[str], checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = two_files(checkpoint("olmoe"), tmp_path / "model")
    (model / "b.safetensors").unlink()
    message = "1 of 2 weight files are missing, the first is 'b.safetensors'"
    check_refused(way, str(model), tmp_path / "a", message)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_model_without_experts(way: list[str], tmp_path: Path) -> None:
    model = tmp_path / "dense"
    Qwen3Config(num_hidden_layers=1, architectures=["Qwen3ForCausalLM"]).save_pretrained(model)
    message = "no MoE layer found (1 decoder layers); calibration needs a mixture-of-experts model"
    check_refused(way, str(model), tmp_path / "a", message)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_second_job_for_one_file(way: list[str], tmp_path: Path) -> None:
    with only_writer(tmp_path / "a"):
        message = "is writing this file; wait for it or give another file name"
        check_refused(way, DEMO, tmp_path / "a", message)
