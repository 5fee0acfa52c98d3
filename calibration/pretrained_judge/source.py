"""The dense model that judges are cut from: SmolLM2-135M-Instruct, out of a GGUF file.

The file comes in parts, so that it can be carried where large files cannot. transformers reads GGUF
only with accelerate; the package gguf is enough here.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

NAME = "smollm2.gguf"
PART_BYTES = 40 * 2**20
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}
"""Modules of transformers' Llama by their names in a GGUF file."""


def write_parts(content: bytes, folder: Path) -> list[Path]:
    """Write ``smollm2.gguf.0``, ``.1`` and so on, of at most 40 MiB each."""
    parts = []
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        parts.append(folder / f"{NAME}.{number}")
        parts[-1].write_bytes(content[start : start + PART_BYTES])
    return parts


def whole_file(folder: Path) -> bytes:
    """The parts, one after another.

    Raises:
        SystemExit: there is none.
    """
    parts = sorted(folder.glob(f"{NAME}.[0-9]"))
    if not parts:
        raise SystemExit(f"{folder}: has no {NAME}.0; give a folder that prepare.py wrote")
    return b"".join(part.read_bytes() for part in parts)


def use_wheels(folder: Path) -> None:
    """Import pure Python packages from the wheels in a folder, if they are not installed."""
    sys.path += [str(wheel) for wheel in folder.glob("*.whl") if str(wheel) not in sys.path]


def open_dense(folder: Path, layers: int | None = None) -> LlamaForCausalLM:
    """The model in a folder that prepare.py wrote: see :func:`load_dense`."""
    use_wheels(folder)
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(whole_file(folder))
        file.flush()
        return load_dense(Path(file.name), layers)


def load_dense(path: Path, layers: int | None = None) -> LlamaForCausalLM:
    """The model of a Llama GGUF file with tied embeddings, in float32.

    Args:
        path: the file.
        layers: take only the first ones.

    Raises:
        SystemExit: it is another architecture.
    """
    from gguf import GGUFReader, dequantize  # a package that nothing else here needs

    reader = GGUFReader(path)
    if (kind := reader.fields["general.architecture"].contents()) != "llama":
        raise SystemExit(f"{path}: is of architecture {kind!r}; a llama is needed")
    config = dense_config(lambda key: reader.fields[f"llama.{key}"].contents(), layers)
    weights = {
        name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        for tensor in reader.tensors
        if (name := name_of(tensor.name, config.num_hidden_layers))
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in weights.items():
        if (projection := name.split(".")[-2]) in heads:
            weights[name] = halves_apart(weight, heads[projection])
    model = LlamaForCausalLM(config)
    left = model.load_state_dict(weights, strict=False)
    assert left.missing_keys == ["lm_head.weight"], left  # it is the embedding's
    assert not left.unexpected_keys, left
    return model.eval()


def dense_config(value: Callable[[str], float], layers: int | None) -> LlamaConfig:
    """The configuration, from the values of a GGUF file by name."""
    heads = int(value("attention.head_count"))
    return LlamaConfig(
        vocab_size=int(value("vocab_size")),
        hidden_size=int(value("embedding_length")),
        intermediate_size=int(value("feed_forward_length")),
        num_hidden_layers=layers or int(value("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(value("attention.head_count_kv")),
        head_dim=int(value("embedding_length")) // heads,
        rms_norm_eps=float(value("attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": float(value("rope.freq_base"))},
        max_position_embeddings=int(value("context_length")),
        tie_word_embeddings=True,
    )


def name_of(name: str, layers: int) -> str | None:
    """What transformers calls a tensor; None: it is of a layer that is left out."""
    *block, kind, _ = name.split(".")
    if not block:
        return f"model.{NAMES[kind]}.weight"
    return f"model.layers.{block[1]}.{NAMES[kind]}.weight" if int(block[1]) < layers else None


def halves_apart(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection as transformers rotates them.

    GGUF files have the two numbers that are rotated together side by side, transformers half a head
    apart (``permute`` of llama.cpp's convert_hf_to_gguf.py, undone).
    """
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)
