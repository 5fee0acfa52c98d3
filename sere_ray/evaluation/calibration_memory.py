"""Peak memory of calibration, ordinary and layer by layer, each in a process of its own."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sere_ray.calibration.loading import quiet
from sere_ray.demo import assets
from sere_ray.errors import SereError
from sere_ray.evaluation.models import CONFIG

LAYERS = 8
SHAPE: dict[str, Any] = {
    **CONFIG,
    "vocab_size": 1024,  # of the demo's tokenizer
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_experts": 64,
    "num_hidden_layers": LAYERS,
}
SEQUENCES, LENGTH = 100, 128
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the random model in float32, as a CPU calibrates it, in MiB."""

    weights_mib: float
    layer_mib: float
    hidden_states_mib: float


def measure_memory() -> dict[str, Any]:
    """Peak resident memory of `sere-ray calibrate` on a random checkpoint of about 400 MB.

    The demo model's process shows what Python and its libraries take.
    """
    with TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        sizes = _save_random(model)
        modes = {
            "demo model": (assets.MODEL, []),
            "ordinary": (model, []),
            "layer-streamed": (model, ["--layer-streamed"]),
        }
        peaks = {
            name: _peak_mib(path, Path(folder) / "out", options)
            for name, (path, options) in modes.items()
        }
    base = peaks["demo model"]
    rows = [
        {"mode": name, "peak_mib": round(peak), "above_demo_model_mib": round(peak - base)}
        for name, peak in peaks.items()
    ]
    rounded = {name: round(value, 1) for name, value in dataclasses.asdict(sizes).items()}
    return {**rounded, "tokens": SEQUENCES * LENGTH, "rows": rows}


def _save_random(folder: Path) -> Sizes:
    shape = dict(SHAPE)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(0)
    with quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="100MB")
    for file in assets.MODEL.glob("*token*"):
        shutil.copy(file, folder)
    decoder = model.get_decoder()
    return Sizes(
        weights_mib=4 * sum(p.numel() for p in model.parameters()) / _MIB,
        layer_mib=4 * sum(p.numel() for p in decoder.layers[0].parameters()) / _MIB,
        hidden_states_mib=4 * SEQUENCES * LENGTH * config.hidden_size / _MIB,
    )


def _peak_mib(model: Path, out: Path, options: list[str]) -> float:
    """Of one `sere-ray calibrate`: the system's own count of resident memory."""
    arguments = {
        "--data": str(assets.CALIBRATION),
        "--out": str(out),
        "--device": "cpu",
        "--sequences": str(SEQUENCES),
        "--length": str(LENGTH),
    }
    pairs = [word for pair in arguments.items() for word in pair]
    process = subprocess.Popen(
        [sys.executable, "-m", "sere_ray", "calibrate", str(model), *pairs, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SereError(f"sere-ray calibrate {model}: ended with {process.returncode}")
    return usage.ru_maxrss * 1024 / _MIB
