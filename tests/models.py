"""Tiny random-weight MoE checkpoints of every supported architecture, made offline.

They are small enough for vLLM on a CPU, too. Routing is not degenerate: weights are drawn with
a standard deviation of 0.1 instead of 0.02.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

ARCHITECTURES = ("qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "mixtral", "olmoe")
NUM_EXPERTS = 16
TOP_K = 4
MOE_LAYERS = {
    name: range(1, 3) if name.startswith("deepseek") else range(4) for name in ARCHITECTURES
}

_VOCABULARY = 1024
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_checkpoint(name: str, folder: Path) -> Path:
    """Write config, bf16 weights and tokenizer into ``folder``.

    Args:
        name: one of ``ARCHITECTURES``, or ``qwen3_moe_64``: the kernel that also computes the
            gate's top-k takes 32 to 256 experts.
        folder: of the checkpoint.
    """
    tokenizer = build_tokenizer()
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = _BUILDERS[name](_common(tokenizer)).to(torch.bfloat16)
    _set_selection_bias(model)
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over 1,024 tokens, trained on modules of the standard library."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    bpe.train([str(path) for path in standard_library(40)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def standard_library(count: int) -> list[Path]:
    """The first ``count`` top-level modules of the running Python, by name."""
    return sorted(Path(os.__file__).parent.glob("*.py"))[:count]


def _common(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": _VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _qwen3_moe(common: dict[str, Any], num_experts: int = NUM_EXPERTS) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **common,
            head_dim=32,
            num_experts=num_experts,
            moe_intermediate_size=64,
            norm_topk_prob=True,
        )
    )


def _qwen2_moe(common: dict[str, Any]) -> PreTrainedModel:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **common,
            num_experts=NUM_EXPERTS,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=128,
            norm_topk_prob=False,
        )
    )


def _deepseek(common: dict[str, Any]) -> dict[str, Any]:
    """One dense layer, two MoE layers; latent attention in the sizes that vLLM's kernels know."""
    return common | {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": NUM_EXPERTS,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "n_group": 4,
        "topk_group": 2,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    }


def _deepseek_v2(common: dict[str, Any]) -> PreTrainedModel:
    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **_deepseek(common),
            topk_method="group_limited_greedy",
            scoring_func="softmax",
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
        )
    )


def _deepseek_v3(common: dict[str, Any]) -> PreTrainedModel:
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_deepseek(common),
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=0,
        )
    )


def _mixtral(common: dict[str, Any]) -> PreTrainedModel:
    sizes = {"intermediate_size": 64, "num_local_experts": NUM_EXPERTS}
    return MixtralForCausalLM(MixtralConfig(**(common | sizes)))


def _olmoe(common: dict[str, Any]) -> PreTrainedModel:
    sizes = {"intermediate_size": 64, "num_experts": NUM_EXPERTS}
    return OlmoeForCausalLM(OlmoeConfig(**(common | sizes)))


def _set_selection_bias(model: PreTrainedModel) -> None:
    """Give DeepSeek-V3's router a bias that matters; a fresh model's is zero."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape) * 0.1)


_BUILDERS: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "qwen3_moe": _qwen3_moe,
    "qwen3_moe_64": functools.partial(_qwen3_moe, num_experts=64),
    "qwen2_moe": _qwen2_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
}
