"""Optimiser, schedule and checkpoint of the recipes."""

import hashlib
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def make_optimizer(model: nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone; norm weights are left free."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = matrices[0].is_cuda
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=fused)


def schedule(progress: float) -> float:
    """Warm up over the first 2 %, then a cosine to zero; progress is the share of the budget."""
    return min(1.0, progress / 0.02) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def rewrite(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file: names that readers other than this transformers release expect."""
    settings = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    """Write the checkpoint in bf16, greedy by default; return the hash of the weights.

    Buffers stay as they are: a selection bias decides in float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.generation_config.update(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rewrite(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    if experts := getattr(model.config, "num_experts", None):
        rewrite(folder / "config.json", num_experts=experts)
    (folder / "model.safetensors").chmod(0o644)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def versions(device: torch.device) -> dict[str, str]:
    """What the run ran on, so that a reader can tell why numbers differ."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
