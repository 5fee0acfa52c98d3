"""Tiny configurations of the families of mixtures of experts that vLLM and transformers both know.

Each family is tiny in its own way: the shapes below are the smallest that its code takes.
"""

from dataclasses import dataclass, field
from typing import Any

EXPERTS, TOP_K = 16, 4
_MOE = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 64}
_ROUTED = {"n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 64}
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "intermediate_size": 64}
_DELTA_NET = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 64,
    "num_hidden_layers": 4,
}
_LATENT_ATTENTION = {
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_key_value_heads": 4,
}
_FIRST_DENSE = {"n_shared_experts": 1, "first_k_dense_replace": 1}
COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
"""What all of them have, but for what a family says otherwise."""


@dataclass(frozen=True)
class Family:
    """A family by the classes of transformers.

    Attributes:
        name: prefix of both classes: ``<name>Config``, ``<name>ForCausalLM``.
        arguments: of the configuration, over ``COMMON``.
        without: arguments of ``COMMON`` that it does not take.
        config: the configuration's class, where it is not ``<name>Config``.
        architecture: as vLLM calls it, where transformers does not.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    config: str | None = None
    architecture: str | None = None


_HEAD = {"head_dim": 32}
FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family("Qwen3Moe", {**_HEAD, **_MOE, "norm_topk_prob": True}),
    "gpt_oss": Family("GptOss", {**_HEAD, **_LOCAL, "sliding_window": 128}),
    "glm4_moe": Family("Glm4Moe", {**_HEAD, **_ROUTED, **_FIRST_DENSE, "num_mtp_layers": 0}),
    "glm4_moe_lite": Family(
        "Glm4MoeLite", {**_ROUTED, **_FIRST_DENSE, **_LATENT_ATTENTION, "moe_layer_freq": 1}
    ),
    "qwen3_next": Family("Qwen3Next", {**_HEAD, **_MOE, **_DELTA_NET}),
    "granitemoe": Family("GraniteMoe", _LOCAL),
    "granitemoehybrid": Family(
        "GraniteMoeHybrid",
        {
            **_LOCAL,
            "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_state": 16,
            "mamba_d_head": 32,
            "position_embedding_type": "rope",
        },
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_Moe",
        {
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
        },
    ),
    "phimoe": Family(
        "Phimoe",
        {**_LOCAL, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
        architecture="PhiMoEForCausalLM",
    ),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1",
        {
            **_HEAD,
            "num_experts": EXPERTS,
            "moe_topk": TOP_K,
            "intermediate_size": 64,
            "rope_theta": 10000.0,
        },
    ),
    "lfm2_moe": Family(
        "Lfm2Moe",
        {**_MOE, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "exaone_moe": Family(
        "ExaoneMoe", {**_HEAD, **_MOE, "num_shared_experts": 1, "sliding_window": 128}
    ),
    "hy_v3": Family(
        "HYV3",
        {
            **_HEAD,
            **_MOE,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "expert_hidden_dim": 64,
            "route_norm": True,
            "qk_norm": True,
        },
    ),
    "mimo_v2_flash": Family(
        "MiMoV2Flash",
        {
            **_HEAD,
            **_ROUTED,
            "v_head_dim": 32,
            "sliding_window": 128,
            "hybrid_layer_pattern": [0, 0, 0],
            "moe_layer_freq": [0, 1, 1],
            "layernorm_epsilon": 1e-5,
            "swa_head_dim": 32,
            "swa_v_head_dim": 32,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
        },
    ),
    "flex_olmo": Family(
        "FlexOlmo", {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "intermediate_size": 64}
    ),
    "dots1": Family("Dots1", {**_HEAD, **_ROUTED, **_FIRST_DENSE}),
    "gemma4": Family(
        "Gemma4",
        {
            **_HEAD,
            "global_head_dim": 32,
            "num_experts": EXPERTS,
            "top_k_experts": TOP_K,
            "moe_intermediate_size": 64,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 128,
            "vocab_size_per_layer_input": 1024,
        },
        config="Gemma4TextConfig",
    ),
    "cohere2_moe": Family(
        "Cohere2Moe",
        {**_HEAD, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "intermediate_size": 64},
    ),
    "afmoe": Family(
        "Afmoe",
        {
            **_HEAD,
            **_MOE,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
            "sliding_window": 128,
            "score_func": "sigmoid",
            "route_norm": True,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5Moe",
        {**_HEAD, **_MOE, **_DELTA_NET},
        without=("intermediate_size",),
        config="Qwen3_5MoeTextConfig",
    ),
    "llama4": Family(
        "Llama4",
        {
            **_HEAD,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size": 64,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": 2048,
        },
        config="Llama4TextConfig",
    ),
    "minimax_m2": Family(
        "MiniMaxM2",
        {
            **_HEAD,
            **_LOCAL,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "rotary_dim": 16,
            "use_qk_norm": True,
            "attn_type_list": [1, 1, 1],
            "num_mtp_modules": 0,
        },
    ),
    "nemotron_h": Family(
        "NemotronH",
        {
            **_HEAD,
            **_ROUTED,
            "moe_shared_expert_intermediate_size": 64,
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 2,
        },
        without=("num_hidden_layers",),
    ),
    "jamba": Family(
        "Jamba",
        {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
}
"""By name; the last ones are known not to start on the CPU build of vLLM 0.32."""
