"""The forward pass for training: the stock models' function, with one product for all experts.

What is of fixed shape is compiled once for all layers; the grouped products are torch's own and are
called as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cut import union
from torch import Tensor, nn
from transformers import PreTrainedModel

UNION_ROWS, UNION_POSITIONS = 16, 64
"""Rows of a measured union, and at how many positions of a batch it is measured."""


@dataclass(frozen=True)
class Routing:
    """What the gate of a layer did with a batch."""

    balance: Tensor
    """1 where all experts are used alike: E * sum of (share of the choices * mean score)."""
    load: Tensor
    """``[E]`` how often each expert was chosen."""
    union: Tensor
    """Share of the experts that 16 rows read."""


def choose(gate: nn.Module, x: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids ``[T, K]``, weights ``[T, K]`` that sum to 1, and scores ``[T, E]`` that sum to 1."""
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(x.float(), gate.weight.float())
    bias = getattr(gate, "e_score_correction_bias", None)
    if bias is None:
        scores = logits.softmax(-1)
        ids = scores.topk(top_k, dim=-1).indices
    else:
        scores = logits.sigmoid()
        ids = (scores + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights, scores / scores.sum(-1, keepdim=True)


def before_experts(
    layer: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor], top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All of a decoder layer but its routed experts.

    Returns:
        The sum so far ``[B, L, H]``; what the experts read ``[T, H]``; ids and weights ``[T, K]``;
        balancing term, loads and union of :class:`Routing`.
    """
    attended, _ = layer.self_attn(layer.input_layernorm(x), rotary, None)
    x = x + attended
    flat = layer.post_attention_layernorm(x).flatten(0, 1)
    ids, weights, scores = choose(layer.mlp.gate, flat, top_k)
    if hasattr(layer.mlp, "shared_experts"):
        x = x + layer.mlp.shared_experts(flat).view_as(x)
    experts = scores.shape[1]
    load = torch.zeros(experts, device=x.device).index_add(
        0, ids.flatten(), torch.ones(ids.numel(), device=x.device)
    )
    balance = experts * (load / ids.numel() * scores.mean(0)).sum()
    rows = ids.view(UNION_ROWS, -1, top_k)
    rows = rows[:, :: max(1, rows.shape[1] // UNION_POSITIONS)]
    return x, flat, ids, weights, balance, load, union(rows, experts).mean() / experts


def activate(gate_up: Tensor, weights: Tensor) -> Tensor:
    """SwiGLU times the weight of its row."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * weights.unsqueeze(-1).to(up.dtype)


def experts_of(
    experts: nn.Module,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    activate_of: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The weighted sum of the chosen experts: ``[T, H]`` of the dtype that products run in."""
    on = x.device.type
    dtype = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else x.dtype
    chosen, order = ids.flatten().sort()
    ends = torch.arange(len(experts.gate_up_proj), device=x.device)
    ends = torch.searchsorted(chosen, ends, right=True).int()

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(rows, weight.to(dtype).transpose(1, 2), offs=ends)

    rows = x.to(dtype).index_select(0, order // ids.shape[1])
    hidden = activate_of(product(rows, experts.gate_up_proj), weights.flatten()[order])
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    out = product(hidden, experts.down_proj).index_select(0, back)
    return out.view(*ids.shape, -1).sum(1)


def forward(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    before_of: Callable[..., tuple[Tensor, ...]] = before_experts,
    activate_of: Callable[[Tensor, Tensor], Tensor] = activate,
) -> tuple[Tensor, list[Routing]]:
    """The last hidden states, normalised, and what every gate did.

    Args:
        model: its weights are used, its forward pass is not.
        ids: ``[B, L]``; B * L a multiple of 16.
        before_of: :func:`before_experts`, or that compiled: once for all layers.
        activate_of: :func:`activate`, or that compiled.
    """
    base, top_k = model.model, model.config.num_experts_per_tok
    x = base.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    rotary = base.rotary_emb(x, position_ids=positions)
    routings = []
    for layer in base.layers:
        x, flat, chosen, weights, *routing = before_of(layer, x, rotary, top_k)
        out = experts_of(layer.mlp.experts, flat, chosen, weights, activate_of)
        x = x + out.view_as(x)
        routings.append(Routing(*routing))
    return base.norm(x), routings
