"""What keeps the share of experts that 16 rows read at its target, layer by layer, as it trains."""

from collections.abc import Sequence

import torch
from routed import Routing
from torch import Tensor
from transformers import PreTrainedModel


class ByLoss:
    """A load-balancing term whose weight follows the measured union.

    The weight of a layer grows while its union is below the target and shrinks while it is above.
    """

    GAIN, MOST = 0.0015, 0.02

    def __init__(self, model: PreTrainedModel, target: float) -> None:
        self.target = target
        self.weights = torch.full((len(model.model.layers),), 0.002, device=model.device)

    def term(self, routings: Sequence[Routing]) -> Tensor:
        """What is added to the loss."""
        return (self.weights * torch.stack([routing.balance for routing in routings])).sum()

    def after(self, routings: Sequence[Routing]) -> None:
        """Follow what a step measured."""
        unions = torch.stack([routing.union for routing in routings]).detach()
        self.weights = (self.weights + self.GAIN * (self.target - unions)).clamp(0, self.MOST)

    def state(self) -> Tensor:
        """What a checkpoint needs beside the model."""
        return self.weights

    def load(self, state: Tensor) -> None:
        """Take what :meth:`state` gave."""
        self.weights = state


class ByBias:
    """The selection bias of DeepSeek-V3, without a loss (arXiv 2412.19437, 2.1.2).

    After each step every expert's bias goes up by a fixed speed if it was chosen less often than
    the mean, else down. The target is ours: only layers whose union is below it move.
    """

    SPEED = 0.001

    def __init__(self, model: PreTrainedModel, target: float) -> None:
        self.target = target
        self.biases = [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers]

    def term(self, routings: Sequence[Routing]) -> float:
        """What is added to the loss: nothing."""
        return 0.0

    @torch.no_grad()
    def after(self, routings: Sequence[Routing]) -> None:
        """Follow what a step measured."""
        for bias, routing in zip(self.biases, routings, strict=True):
            less = torch.sign(routing.load.mean() - routing.load)
            bias += self.SPEED * less * (routing.union < self.target)

    def state(self) -> Tensor:
        """What a checkpoint needs beside the model, whose buffers the biases are."""
        return torch.empty(0)

    def load(self, state: Tensor) -> None:
        """Take what :meth:`state` gave."""
