"""Draft models of random weights for the checkpoints of ``tests/models.py``."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models import build_tokenizer


def add_mtp_layer(checkpoint: Path, folder: Path) -> Path:
    """A DeepSeek-V3 checkpoint with a layer that predicts one token more: its last one again.

    Args:
        checkpoint: of ``deepseek_v3``.
        folder: where; replaced.
    """
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    layer, hidden = config["num_hidden_layers"], config["hidden_size"]
    weights = load_file(folder / "model.safetensors")
    last, mtp = f"model.layers.{layer - 1}.", f"model.layers.{layer}."
    copied = [name for name in weights if name.startswith(last)]
    extra = {mtp + name.removeprefix(last): weights[name].clone() for name in copied}
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(hidden, 2 * hidden, generator=generator) * 0.1
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    extra |= {
        f"{mtp}enorm.weight": ones.clone(),
        f"{mtp}hnorm.weight": ones.clone(),
        f"{mtp}eh_proj.weight": projection.bfloat16(),
        f"{mtp}shared_head.norm.weight": ones.clone(),
        f"{mtp}shared_head.head.weight": weights["lm_head.weight"].clone(),
        f"{mtp}embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
    }
    save_file({**weights, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return folder


def build_eagle_head(checkpoint: Path, folder: Path) -> Path:
    """An EAGLE head of one dense Llama layer.

    Args:
        checkpoint: of the model that it drafts for.
        folder: where; made here.
    """
    target = json.loads((checkpoint / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=target["vocab_size"],
        hidden_size=target["hidden_size"],
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=target["max_position_embeddings"],
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    weights = {
        name.removeprefix("model."): tensor.clone()
        for name, tensor in model.state_dict().items()
        if name.startswith("model.layers.") and not name.endswith("0.input_layernorm.weight")
    }
    weights["fc.weight"] = torch.randn(config.hidden_size, 2 * config.hidden_size).bfloat16() * 0.1
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer().save_pretrained(folder)
    return folder
