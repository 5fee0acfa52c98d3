"""What ACE (arXiv 2609.05228) reads off a model's weights: how much an expert can do, in two views.

Formulas: its code, github.com/xzktx003/moe-prune (``src/amp_proxy.py``).
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sere_ray.calibration.collect import MoELayer, find_moe_layers
from sere_ray.calibration.experts import expert_outputs
from sere_ray.util.errors import UnsupportedError

_NORM = "post_attention_layernorm"
"""Of the norm before a mixture of experts, in most decoders of transformers."""
_STACKED = ("gate_up_proj", "down_proj")
NAMES = ("ace_gsp", "ace_rcr")


@torch.no_grad()
def ace_statistics(model: PreTrainedModel) -> dict[int, dict[str, Tensor]]:
    """``ace_gsp [E]`` and ``ace_rcr [E]`` by decoder layer, each with mean 1.

    Raises:
        UnsupportedError: the layer's norm or its stacked weights are not where they should be.
    """
    found = {}
    for index, layer in find_moe_layers(model).items():
        norm = getattr(model.get_decoder().layers[index], _NORM, None)
        parts = (
            getattr(norm, "weight", None),
            *(getattr(layer.experts, n, None) for n in _STACKED),
        )
        parameters = [part.float() for part in parts if isinstance(part, nn.Parameter)]
        if len(parameters) < len(parts):
            raise UnsupportedError(
                f"layer {index}: rule 'ace' reads {_NORM}, {' and '.join(_STACKED)}, which this "
                "model has not; leave ace out"
            )
        views = (spectral(*parameters), along_router(layer))
        found[index] = {n: view / view.mean() for n, view in zip(NAMES, views, strict=True)}
    return found


def spectral(gamma: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``[E]``: sqrt(||g U|| ||g G D|| ||g G|| ||g U D||), Frobenius norms, g = diag(gamma).

    Args:
        gamma: ``[H]`` of the norm before the layer.
        gate_up: ``[E, 2 I, H]``, gate G before up U.
        down: ``[E, H, I]``, D.
    """
    gate, up = (part * gamma for part in gate_up.chunk(2, dim=1))  # [E, I, H]
    products = down.mT @ down  # [E, I, I]

    def through(first: Tensor) -> Tensor:  # ||A D||^2 = <A A^T, D^T D>
        return ((first @ first.mT) * products).sum(dim=(1, 2)).clamp(min=0).sqrt()

    plain = gate.norm(dim=(1, 2)) * up.norm(dim=(1, 2))
    views: Tensor = (plain * through(gate) * through(up)).sqrt()
    return views


def along_router(layer: MoELayer) -> Tensor:
    """``[E]``: ||e(q)|| / ||q||, q the expert's own row of the gate, less the mean row, RMS 1."""
    rows = layer.gate_weight.float()
    rows = rows - rows.mean(dim=0, keepdim=True)
    rows = rows / rows.square().mean(dim=1, keepdim=True).sqrt()
    tokens = rows.to(layer.gate_weight.dtype)
    own = expert_outputs(layer.experts, tokens, len(rows)).diagonal(dim1=0, dim2=1).mT  # [E, H]
    response: Tensor = own.float().norm(dim=1) / rows.norm(dim=1)
    return response
