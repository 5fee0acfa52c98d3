"""How tokens spread over the experts of random weights: evenly, or as under a trained gate."""

from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sere_ray.util.errors import SereError

Router = Literal["uniform", "skewed"]
ROUTERS: tuple[Router, ...] = ("uniform", "skewed")

SIGMA = 0.75
"""Spread of the scales of the gate's rows, for ``--router skewed``.

Trained gates prefer some experts: 16 tokens of Qwen3-30B-A3B are said to choose about 50 of its 128
experts a layer (where that was published is not recorded here), those of random weights 82. Logits
``s_e * N(0, 1)`` with log s_e ~ N(0, SIGMA),
simulated by `simulate_union` with 400 layers of 16 rows:

=======  ==================  =================  =================
SIGMA    128 experts, top-8  64 experts, top-6  60 experts, top-4
=======  ==================  =================  =================
0        82.2                50.7               40.2
0.5      59.2                39.1               29.7
0.7      51.5                34.7               26.0
0.75     50.0                33.8               25.3
0.8      48.6                33.0               24.7
1.0      44.1                30.3               22.5
=======  ==================  =================  =================
"""


def expert_scales(num_experts: int, layer: int, sigma: float = SIGMA) -> NDArray[np.float64]:
    """``[E]`` factors of a layer's gate rows: log-normal quantiles, in an order of its own."""
    normal = NormalDist()
    quantiles = [normal.inv_cdf((i + 0.5) / num_experts) for i in range(num_experts)]
    order = np.random.default_rng(layer).permutation(num_experts)
    scales: NDArray[np.float64] = np.exp(sigma * np.array(quantiles)[order])
    return scales


def simulate_union(
    num_experts: int, top_k: int, rows: int, sigma: float, *, layers: int = 400
) -> float:
    """Mean number of distinct experts that ``rows`` rows name with their K choices, simulated.

    Args:
        num_experts: E.
        top_k: K.
        rows: of a step.
        sigma: spread of the scales; 0 = all experts alike.
        layers: how many layers the mean is over.
    """
    rng = np.random.default_rng(0)
    found = 0
    for layer in range(layers):
        scales = expert_scales(num_experts, layer, sigma)
        logits = rng.standard_normal((rows, num_experts)) * scales
        found += len(np.unique(np.argsort(-logits, axis=1)[:, :top_k]))
    return found / layers


def skew_gates(model: torch.nn.Module) -> int:
    """Scale the gate rows of every MoE layer in place; graphs read the same memory.

    Returns:
        How many layers were scaled.

    Raises:
        SereError: none was found, or a gate has no plain weight.
    """
    scaled = 0
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-2:] not in (["mlp", "gate"], ["mlp", "router"]):
            continue
        weight: Any = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            raise SereError(f"--router skewed: {name} has no weight that could be scaled")
        scales = torch.from_numpy(expert_scales(weight.shape[0], int(parts[-3])))
        with torch.no_grad():
            weight.mul_(scales.to(weight.device, weight.dtype)[:, None])
        scaled += 1
    if not scaled:
        raise SereError("--router skewed: this model has no module layers.N.mlp.gate or router")
    return scaled
