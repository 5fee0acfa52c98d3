"""Adapters for tests, of random weights, as PEFT writes them."""

import json

import torch
from safetensors.torch import save_file

RANK = 8


def write_adapter(folder, shapes, *, scale=0.3):
    """An adapter that changes some modules.

    Args:
        folder: of the adapter; made here.
        shapes: name of a module in the model -> (outputs, inputs).
        scale: standard deviation of its values.
    """
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name, (outputs, inputs) in shapes.items():
        for half, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
            values = torch.randn(shape, generator=generator) * scale
            tensors[f"base_model.model.{name}.{half}.weight"] = values.to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
