"""Models that benchmarks serve: shapes with random weights, and a tokenizer for them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere_ray import assets

_COMMON: dict[str, Any] = {
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_QWEN3: dict[str, Any] = {
    **_COMMON,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
CONFIG: dict[str, Any] = {
    **_QWEN3,
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
"""What the random models for CPUs share."""

PUBLIC: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        **_QWEN3,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "max_position_embeddings": 40960,
        "torch_dtype": "bfloat16",
    },
    "qwen1.5-moe-a2.7b": {
        **_COMMON,
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
    },
    "deepseek-v2-lite": {
        **_COMMON,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "max_position_embeddings": 163840,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "torch_dtype": "bfloat16",
    },
}
PUBLIC["qwen3-30b-a3b-fp8"] = {
    **PUBLIC["qwen3-30b-a3b"],
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(48))],
    },
}
PUBLIC["gpt-oss-120b"] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "eos_token_id": 200002,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "mxfp4"},
}
"""Shapes of public checkpoints, in full but for layers of gpt-oss-120b: 24 of its 36."""
_TOKENIZER_FILES = ("tokenizer_config.json", "chat_template.jinja")
_SIZES = {
    "qwen3-30b-a3b": "61 GB",
    "qwen3-30b-a3b-fp8": "31 GB, FP8 block 128",
    "gpt-oss-120b": "43 GB, MXFP4 experts",
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
        """Of the experts' weights."""
        quantised = self.config.get("quantization_config")
        return str(quantised["quant_method"] if quantised else self._dtype)

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


def with_layers(model: Model, layers: int) -> Model:
    """The same shapes with so many layers, for a dry run."""
    return Model(
        f"{model.name}, {layers} layers only", {**model.config, "num_hidden_layers": layers}
    )


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
