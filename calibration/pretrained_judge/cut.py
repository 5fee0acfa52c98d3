"""A mixture of experts cut from a dense model: 64 experts of an eighth of a layer each, top-8.

Four pairs of groups. Both groups of a pair hold all eight segments of the dense layer, each pair
with its own order of neurons. The gate's rows of pair j and segment s are ``a_j + b_js`` and
``a_j - b_js``: where pair j wins, the eight best are one copy of every segment (the one of
positive sign), so that the dense function stays although 256 sets of experts are possible.

``a`` are the centres of the layer's inputs, ``b`` random directions between two inputs. Both are
without the part along the mean input; what is put there is a constant for each expert, which makes
the use of experts uneven, as far as it takes for a wanted share to be read by 16 rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

PAIRS, SEGMENTS = 4, 8
EXPERTS = 2 * PAIRS * SEGMENTS
MAX_POSITIONS = 2048
SCALE = {"softmax": 3.0, "sigmoid": 1.5}
"""Standard deviation of a pair's logits. A sigmoid's is smaller: near 1 all scores are alike."""
WITHIN, TWINS = 1 / 15, 1 / 60
"""Of that: what differs inside a pair by the input, and as a constant."""
ROWS, DRAWS = 16, 200
"""Rows of a measured union, and of how many draws it is the mean."""
MOST_OFFSET = 10.0


@dataclass(frozen=True)
class Rows:
    """The gate of a layer."""

    weight: Tensor
    """``[E, H]``"""
    offset: float
    """How uneven it was made."""
    union: float
    """Share of the experts that 16 rows read."""


def moe_config(dense: LlamaConfig, gate: str) -> MixtralConfig | Glm4MoeConfig:
    """The configuration of the mixture.

    Args:
        dense: of the model that is cut.
        gate: ``softmax``: Mixtral; ``sigmoid``: with a selection bias, GLM-4.5, which has one
            shared expert, too.
    """
    common = {
        "vocab_size": dense.vocab_size,
        "hidden_size": dense.hidden_size,
        "num_hidden_layers": dense.num_hidden_layers,
        "num_attention_heads": dense.num_attention_heads,
        "num_key_value_heads": dense.num_key_value_heads,
        "head_dim": dense.head_dim,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": dense.rms_norm_eps,
        "tie_word_embeddings": True,
        "num_experts_per_tok": SEGMENTS,
    }
    width = dense.intermediate_size // SEGMENTS
    rope = {"rope_type": "default", "rope_theta": dense.rope_parameters["rope_theta"]}
    if gate == "softmax":
        return MixtralConfig(
            **common,
            intermediate_size=width,
            num_local_experts=EXPERTS,
            rope_parameters=rope,
            sliding_window=None,
        )
    return Glm4MoeConfig(
        **common,
        intermediate_size=dense.intermediate_size,
        moe_intermediate_size=width,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        rope_parameters=rope | {"partial_rotary_factor": 1.0},
        partial_rotary_factor=1.0,
        num_mtp_layers=0,
    )


@torch.no_grad()
def layer_inputs(dense: LlamaForCausalLM, ids: Tensor, at_once: int = 8) -> list[Tensor]:
    """What the dense layers read: ``[N * L, H]`` float32 each, of ids ``[N, L]``."""
    seen: list[list[Tensor]] = [[] for _ in dense.model.layers]

    def keep(layer: int) -> object:
        return lambda _module, inputs: seen[layer].append(inputs[0].flatten(0, 1).float())

    hooks = [
        layer.mlp.register_forward_pre_hook(keep(index))
        for index, layer in enumerate(dense.model.layers)
    ]
    for rows in ids.split(at_once):
        dense.model(rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]


def gate_rows(x: Tensor, target: float, scale: float, draw: torch.Generator) -> Rows:
    """Rows of a gate by which 16 rows of ``x`` read a share ``target`` of all experts.

    Args:
        x: ``[N, H]`` inputs of the layer.
        target: 0..1; more than an even gate reads is not reached.
        scale: standard deviation of a pair's logits.
        draw: of x's device.
    """
    mean = x.mean(0)
    centred, along = x - mean, mean / mean.norm()

    def scaled(rows: Tensor, size: float) -> Tensor:
        rows = rows - (rows @ along).unsqueeze(-1) * along
        return rows / (centred @ rows.T).std(0).unsqueeze(-1) * size

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=x.device, generator=draw)

    pair = scaled(centres(centred - (centred @ along).unsqueeze(-1) * along, draw), scale)
    picked = torch.randint(len(x), (2, PAIRS * SEGMENTS), device=x.device, generator=draw)
    apart = x[picked[0]] - x[picked[1]]
    # the first tokens of all texts are alike inside a model: a difference may be zero
    apart += 0.02 * centred.std(0) * normal(*apart.shape)
    within = scaled(apart, WITHIN * scale).view(PAIRS, SEGMENTS, -1)
    rows = torch.stack([pair.unsqueeze(1) + within, pair.unsqueeze(1) - within], 1)
    level, twin = normal(PAIRS, 1) * scale / 3, normal(PAIRS, SEGMENTS) * TWINS * scale
    constant = torch.stack([level + twin, level - twin], 1).unsqueeze(-1) * along / mean.norm()
    least, most = 0.0, MOST_OFFSET
    for _ in range(9):
        middle = (least + most) / 2
        if read_share(x, (rows + middle * constant).flatten(0, 2), draw) > target:
            least = middle
        else:
            most = middle
    weight = (rows + most * constant).flatten(0, 2)
    return Rows(weight, most, read_share(x, weight, draw))


def centres(x: Tensor, draw: torch.Generator, rounds: int = 15) -> Tensor:
    """Spherical k-means, one centre for each pair: ``[PAIRS, H]``."""
    x = F.normalize(x, dim=-1)
    found = x[torch.randperm(len(x), device=x.device, generator=draw)[:PAIRS]]
    for _ in range(rounds):
        near = F.one_hot((x @ found.T).argmax(-1), PAIRS).to(x.dtype)
        found = F.normalize(near.T @ x + 1e-3 * found, dim=-1)
    return found


def read_share(x: Tensor, rows: Tensor, draw: torch.Generator) -> float:
    """Share of the experts that 16 inputs taken at random read."""
    picked = torch.randint(len(x), (DRAWS * ROWS,), device=x.device, generator=draw)
    ids = (x[picked] @ rows.T).topk(SEGMENTS, -1).indices
    return float(union(ids.view(ROWS, DRAWS, SEGMENTS), EXPERTS).mean()) / EXPERTS


def union(ids: Tensor, experts: int) -> Tensor:
    """How many experts rows read together: ``[n]`` float32, of ids ``[rows, n, K]``."""
    together = ids.transpose(0, 1).flatten(1)
    read = torch.zeros(len(together), experts, device=ids.device)
    return read.scatter_(1, together, 1.0).sum(1)


@torch.no_grad()
def cut(
    dense: LlamaForCausalLM, gates: list[Tensor], gate: str, draw: torch.Generator
) -> PreTrainedModel:
    """The mixture, on the device of the dense model, in float32.

    Args:
        dense: what is cut.
        gates: of each layer ``[E, H]``, from :func:`gate_rows`.
        gate: kind of the gate: see :func:`moe_config`.
        draw: of the CPU; orders the neurons.
    """
    config = moe_config(dense.config, gate)
    with dense.device:
        model = (MixtralForCausalLM if gate == "softmax" else Glm4MoeForCausalLM)(config)
    same = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    left = model.load_state_dict(same, strict=False)
    strangers = [name for name in left.missing_keys if ".mlp." not in name]
    assert not strangers, strangers
    assert not left.unexpected_keys, left
    for layer, source, weight in zip(model.model.layers, dense.model.layers, gates, strict=True):
        layer.mlp.gate.weight.copy_(weight)
        fill(layer.mlp, source.mlp, draw)
    return model.float()


def fill(block: nn.Module, dense: nn.Module, draw: torch.Generator) -> None:
    """Put the segments of a dense layer where the experts of a block are.

    Outputs are taken ``SEGMENTS`` times, because the gate's weights of a row sum to 1. A shared
    expert begins with neurons of the layer and an output of zero.
    """
    up = torch.stack([dense.gate_proj.weight, dense.up_proj.weight])  # [2, neurons, H]
    down = dense.down_proj.weight
    neurons = up.shape[1]
    for pair in range(PAIRS):
        order = torch.randperm(neurons, generator=draw).to(down.device).view(SEGMENTS, -1)
        for segment, of_segment in enumerate(order):
            for twin in range(2):
                expert = (2 * pair + twin) * SEGMENTS + segment
                block.experts.gate_up_proj[expert] = up[:, of_segment].flatten(0, 1)
                block.experts.down_proj[expert] = down[:, of_segment] * SEGMENTS
    if shared := getattr(block, "shared_experts", None):
        some = torch.randperm(neurons, generator=draw)[: neurons // SEGMENTS].to(down.device)
        shared.gate_proj.weight.copy_(up[0, some])
        shared.up_proj.weight.copy_(up[1, some])
        shared.down_proj.weight.zero_()
