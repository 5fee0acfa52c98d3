"""The forward pass for training: the stock model's function, with every expert on every token."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def dense_experts(block: nn.Module, x: Tensor, config: Qwen3MoeConfig) -> tuple[Tensor, Tensor]:
    """The stock block's function as two dense products, and the load-balancing term.

    Every expert runs on every token and a zero gate drops the ones that are not routed to. With
    experts this small that is faster than gathering tokens, and it compiles to a static graph.
    The balancing term is per layer, so that no layer can lean on another one's balance.
    """
    flat = x.reshape(-1, x.shape[-1])
    count, inner = config.num_experts, config.moe_intermediate_size
    probabilities = F.linear(flat, block.gate.weight).float().softmax(-1)
    top, index = probabilities.topk(config.num_experts_per_tok, dim=-1)
    top = top / top.sum(-1, keepdim=True)
    gates = torch.zeros_like(probabilities).scatter(1, index, top)
    gate_up = F.linear(flat, block.experts.gate_up_proj.reshape(count * 2 * inner, -1))
    gate, up = gate_up.view(-1, count, 2 * inner).chunk(2, dim=-1)
    hidden = F.silu(gate) * up * gates.to(gate.dtype).unsqueeze(-1)
    down = block.experts.down_proj.transpose(1, 2).reshape(count * inner, -1)
    out = hidden.reshape(-1, count * inner) @ down.to(hidden.dtype)
    load = (gates > 0).float().mean(0)
    return out.view_as(x), count * (load * probabilities.mean(0)).sum()


def run_layer(
    layer: nn.Module,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    config: Qwen3MoeConfig,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """One decoder layer, and its balancing term; dropout on what each block adds."""
    attended, _ = layer.self_attn(layer.input_layernorm(x), rotary, None)
    x = x + F.dropout(attended, dropout)
    out, balance = dense_experts(layer.mlp, layer.post_attention_layernorm(x), config)
    return x + F.dropout(out, dropout), balance


def next_token_loss(head: Tensor, x: Tensor, inputs: Tensor, targets: Tensor, pad: int) -> Tensor:
    """Mean loss. A pad token is a target only when it directly follows text, where it marks the
    end of a document."""
    logits = F.linear(x, head).float()
    targets = targets.masked_fill((inputs == pad) & (targets == pad), -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def training_losses(
    model: Qwen3MoeForCausalLM,
    ids: Tensor,
    dropout: float = 0.0,
    *,
    layer_of: Callable[..., tuple[Tensor, Tensor]] = run_layer,
    loss_of: Callable[..., Tensor] = next_token_loss,
) -> tuple[Tensor, Tensor]:
    """Mean next-token loss and mean balancing term of a batch of rows.

    Dropout is what lets a source of this size be read many times.

    Args:
        model: its weights are used, its forward pass is not.
        ids: ``[rows, length + 1]``.
        dropout: share of zeros.
        layer_of: :func:`run_layer`, or that compiled: once for all layers.
        loss_of: :func:`next_token_loss`, or that compiled.
    """
    base, config = model.model, model.config
    inputs, targets = ids[:, :-1], ids[:, 1:]
    x = F.dropout(base.embed_tokens(inputs), dropout)
    positions = torch.arange(inputs.shape[1], device=ids.device).unsqueeze(0)
    rotary = base.rotary_emb(x, position_ids=positions)
    balance = x.new_zeros((), dtype=torch.float32)
    for layer in base.layers:
        x, term = layer_of(layer, x, rotary, config, dropout)
        balance = balance + term / config.num_hidden_layers
    pad = config.pad_token_id
    return loss_of(base.embed_tokens.weight, base.norm(x), inputs, targets, pad), balance
