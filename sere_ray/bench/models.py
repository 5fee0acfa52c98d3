"""Models that benchmarks serve: shapes with random weights, and a tokenizer for them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere_ray import assets
from sere_ray.bench.model_shapes import CONFIG, PUBLIC
from sere_ray.bench.routing import Gate

_TOKENIZER_FILES = ("tokenizer_config.json", "chat_template.jinja")
_SIZES = {
    "qwen3-30b-a3b": "61 GB",
    "qwen3-235b-a22b": "470 GB",
    "qwen3-30b-a3b-fp8": "31 GB, FP8 block 128",
    "qwen3-30b-a3b-fp8-tensor": "31 GB, FP8 per tensor",
    "qwen3-30b-a3b-gptq": "17 GB, INT4 (GPTQ)",
    "qwen3-30b-a3b-awq": "17 GB, INT4 (AWQ)",
    "gpt-oss-120b": "36 GB, MXFP4 experts",
    "deepseek-v3-fp8": "28 GB, FP8 block 128",
    "qwen1.5-moe-a2.7b": "29 GB",
    "deepseek-v2-lite": "31 GB",
}


@dataclass(frozen=True)
class Model:
    """A configuration; its weights are drawn at random."""

    name: str
    config: dict[str, Any]

    @property
    def format(self) -> str:
        """Of the experts' weights, by the names of kernels/check_experts.py."""
        quantised = self.config.get("quantization_config")
        if quantised is None:
            return self._dtype
        if quantised["quant_method"] == "fp8":
            return "fp8-block" if "weight_block_size" in quantised else "fp8-tensor"
        int4 = "int4-" if quantised.get("bits") == 4 else ""
        return f"{int4}{quantised['quant_method']}"

    @property
    def is_quantised(self) -> bool:
        """Whether vLLM's own dummy weights would make all rows alike."""
        return "quantization_config" in self.config

    @property
    def stock_back_ends(self) -> list[str]:
        """``--moe-backend`` of the stock engines; others are compared with the fastest one."""
        return ["auto", "marlin"] if self.format == "mxfp4" else ["auto"]

    @property
    def rerouted_back_end(self) -> str | None:
        """``--moe-backend`` of the engine that re-routes, where vLLM's own choice cannot."""
        return "marlin" if self.format == "mxfp4" else None

    @property
    def top_k(self) -> int:
        """K of the model."""
        return int(self.config["num_experts_per_tok"])

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer."""
        names = ("n_routed_experts", "num_local_experts", "num_experts")
        return next(int(self.config[name]) for name in names if name in self.config)

    @property
    def gate(self) -> Gate:
        """How its layers choose."""
        groups, taken = self.config.get("n_group", 1), self.config.get("topk_group", 1)
        sigmoid = self.config.get("scoring_func") == "sigmoid"
        return Gate(self.num_experts, self.top_k, groups, taken, sigmoid)

    @property
    def kv_bytes_per_token(self) -> int:
        """What one token of context holds in the KV cache, over all layers."""
        config = self.config
        if "kv_lora_rank" in config:
            width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        else:
            head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            width = 2 * config["num_key_value_heads"] * head
        return int(width * config["num_hidden_layers"] * self._bytes_per_value)

    @property
    def _bytes_per_value(self) -> int:
        return {"float32": 4, "bfloat16": 2}[self._dtype]

    @property
    def _dtype(self) -> str:
        return str(self.config.get("torch_dtype") or self.config["dtype"])


def get_model(name: str) -> Model:
    """One of ``PUBLIC``, ``demo``, ``random-e128`` or ``random-e64``.

    The random ones are far beyond a CPU's cache: layers x experts x 3 x 1024 x width x bytes.
    ``random-e128`` has the 128 experts, top-8, of Qwen3-30B-A3B and float32 weights, which CPUs
    without bf16 arithmetic read as they are.
    """
    if name == "demo":
        config = assets.model_config()
        return Model("demo model: 4 layers x 48 experts, top-4, 5 MB, bf16", config)
    if name in PUBLIC:
        model = Model(name, PUBLIC[name])
        return Model(f"{name}: {_shape(model)}, {_SIZES[name]}, random weights", model.config)
    layers, experts, width, dtype, size = {
        "random-e128": (4, 128, 640, "float32", "4.0 GB"),
        "random-e64": (8, 64, 640, "bfloat16", "2.0 GB"),
    }[name]
    config = {
        **CONFIG,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "moe_intermediate_size": width,
        "torch_dtype": dtype,
    }
    return Model(f"random: {layers} layers x {experts} experts, top-8, {size}, {dtype}", config)


def with_layers(model: Model, layers: int | None) -> Model:
    """The same shapes with so many layers, for less memory or a dry run; None = all."""
    if layers is None:
        return model
    fewer: dict[str, Any] = {"num_hidden_layers": layers}
    if "layer_types" in model.config:
        fewer["layer_types"] = model.config["layer_types"][:layers]
    return Model(f"{model.name}, {layers} layers only", {**model.config, **fewer})


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer for a model that is only a shape: the demo's, with more words.

    It encodes text as the demo's does, and decodes every id of the vocabulary.

    Args:
        folder: of the model.
        vocabulary: tokens that the model may put out; at least the demo's.
    """
    content = json.loads((assets.MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    tokens: dict[str, int] = content["model"]["vocab"]
    # No merge leads to them, so no text is encoded with them. Ġ is the space of byte-level BPE.
    tokens.update({f"Ġw{number}": number for number in range(len(tokens), vocabulary)})
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    for name in _TOKENIZER_FILES:
        shutil.copy(assets.MODEL / name, folder / name)


def _shape(model: Model) -> str:
    layers = model.config["num_hidden_layers"] - model.config.get("first_k_dense_replace", 0)
    return f"{layers} layers x {model.num_experts} experts, top-{model.top_k}"
