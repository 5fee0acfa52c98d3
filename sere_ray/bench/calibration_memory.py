"""Peak memory of calibration, ordinary and layer by layer, each in a process of its own."""

import dataclasses
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from sere_ray import assets
from sere_ray.bench.model_shapes import CONFIG
from sere_ray.calibration.loading import quiet
from sere_ray.util.errors import SereError
from sere_ray.util.progress import waiting

LAYERS = 8
SHAPE: dict[str, Any] = {
    **CONFIG,
    "vocab_size": 1024,  # of the demo's tokenizer
    "hidden_size": 4096,  # hidden states that show beside a layer, without many tokens
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "num_hidden_layers": LAYERS,
}
SEQUENCES, LENGTH = 32, 128
BATCH_SIZE = 4
"""Windows of a forward pass: its activations are small beside a layer."""
_MIB = 2**20
_EVERY_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the random model takes in float32, the dtype in which a CPU calibrates it; in MiB."""

    weights_mib: float
    layer_mib: float
    hidden_states_mib: float


def measure_memory(console: Console) -> dict[str, Any]:
    """Peak resident memory of `sere-ray calibrate` on a random checkpoint of about 440 MB in bf16.

    The demo model's process shows what Python and its libraries take.

    Args:
        console: where progress goes.
    """
    with TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        sizes = _save_random(model)
        modes = {
            "demo model": (assets.MODEL, []),
            "ordinary": (model, []),
            "layer-streamed": (model, ["--layer-streamed"]),
        }
        peaks = {}
        for name, (path, options) in modes.items():
            with waiting(console, name):
                peaks[name] = _peak_mib(path, Path(folder) / "out", options)
    base = peaks["demo model"]
    rows = [
        {"mode": name, "peak_mib": round(peak), "above_demo_model_mib": round(peak - base)}
        for name, peak in peaks.items()
    ]
    rounded = {name: round(value, 1) for name, value in dataclasses.asdict(sizes).items()}
    return {**rounded, "tokens": SEQUENCES * LENGTH, "batch_size": BATCH_SIZE, "rows": rows}


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
    """Peak resident memory of one run of `sere-ray calibrate`, in MiB, as the system counts it.

    Raises:
        SereError: the command fails.
    """
    arguments = {
        "--data": str(assets.CALIBRATION),
        "--out": str(out),
        "--device": "cpu",
        "--sequences": str(SEQUENCES),
        "--length": str(LENGTH),
        "--batch-size": str(BATCH_SIZE),
    }
    pairs = [word for pair in arguments.items() for word in pair]
    process = subprocess.Popen(
        [sys.executable, "-m", "sere_ray", "calibrate", str(model), *pairs, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _high_water_mib(process.pid))
        time.sleep(_EVERY_SECONDS)
    if process.returncode != 0:
        raise SereError(f"sere-ray calibrate {model}: ended with {process.returncode}")
    return peak


def _high_water_mib(pid: int) -> float:
    """The most resident memory that a process has had so far, in MiB.

    Not by `wait4`: its number includes this process's own memory, from before the child's exec.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0  # it has just ended
