"""How tokens spread over the experts of random weights: evenly, or as under a trained gate."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sere_ray.bench.weights import BIAS_SPREAD, GATE_SPREAD
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


@dataclass(frozen=True)
class Gate:
    """How a layer chooses.

    Attributes:
        num_experts: E.
        top_k: K.
        groups: the experts are divided into so many; each counts as its two best.
        groups_taken: from so many of them experts are chosen.
        sigmoid: scores are sigmoids plus a bias of the expert, and no softmax.
    """

    num_experts: int
    top_k: int
    groups: int = 1
    groups_taken: int = 1
    sigmoid: bool = False

    def choose(self, scores: NDArray[np.float64]) -> NDArray[np.int64]:
        """``[rows, K]`` of ``[rows, E]``."""
        if self.groups > 1:
            by_group = scores.reshape(len(scores), self.groups, -1)
            best = np.sort(by_group, axis=2)[:, :, -2:].sum(axis=2)
            taken = np.argsort(-best, axis=1)[:, : self.groups_taken]
            left_out = np.ones((len(scores), self.groups), dtype=bool)
            np.put_along_axis(left_out, taken, False, axis=1)
            scores = np.where(left_out[:, :, None], -np.inf, by_group).reshape(scores.shape)
        chosen: NDArray[np.int64] = np.argsort(-scores, axis=1)[:, : self.top_k]
        return chosen


def simulate_union(gate: Gate, rows: int, sigma: float, *, layers: int = 400) -> float:
    """Mean number of distinct experts that rows name, simulated.

    Args:
        gate: of the layers.
        rows: of a step.
        sigma: spread of the scales; 0 = all experts alike.
        layers: how many layers the mean is over.
    """
    rng = np.random.default_rng(0)
    found = 0
    for layer in range(layers):
        scales = expert_scales(gate.num_experts, layer, sigma)
        scores = rng.standard_normal((rows, gate.num_experts)) * scales
        if gate.sigmoid:
            bias = rng.standard_normal(gate.num_experts) * BIAS_SPREAD
            scores = 1 / (1 + np.exp(-scores * GATE_SPREAD[True])) + bias
        found += len(np.unique(gate.choose(scores)))
    return found / layers


NEAR = 0.15
"""So far may the experts that rows name be from what the simulation says."""


def check_rows_differ(gate: Gate, rows: int, sigma: float, named: float) -> None:
    """Refuse to report steps whose rows are alike, as those of badly drawn weights are.

    Args:
        gate: of the model.
        rows: of a step.
        sigma: spread of the gates' scales.
        named: experts that the rows named, mean over layers.

    Raises:
        SereError: says how many were named and expected.
    """
    expected = simulate_union(gate, rows, sigma, layers=100)
    if abs(named / expected - 1) > NEAR:
        raise SereError(
            f"{rows} rows named {named:.1f} experts a layer, simulated are {expected:.1f}: the "
            "random weights make rows alike, or the gate prefers others; no time is reported"
        )


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
