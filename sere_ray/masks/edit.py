"""EDiT (arXiv 2412.07210): workers step on their own for a while, then meet layer by layer.

Between two meetings a worker's masks move from what all had last by a pseudo-gradient
delta = last - own. At a meeting, for each layer on its own: workers whose norm of delta is out of
the ordinary are left out (:class:`Norms`), the others are averaged (:func:`weights_of`), the
average is clipped, and SGD with Nesterov momentum takes it as the gradient of what all had last.

Norms are root mean squares over a layer's entries, in units of the learning rates that a worker's
steps had in sum. So a number means the same for layers of any size and at any learning rate, which
falls over a level; the paper's are plain norms at a constant rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from sere_ray.masks.exchange import Exchange, Sum

OUTER_RATE = 0.7
"""Of the outer SGD, as published."""
OUTER_MOMENTUM = 0.5
"""Published is 0.8. On the demo model that gave a higher loss with both of two seeds: few meetings,
and a learning rate that falls, leave a long momentum no time to settle."""
MOST_NORM = 1.0
"""Norms above are clipped to it: Adam moves an entry by about the learning rate a step, at most."""
STEPS_SHARE = 0.5
"""Of a worker's weight under A-EDiT that goes by its number of steps, as in atorch."""
_MOST_DEVIATIONS = 3.0
_SMOOTHING = 0.02
_FEWEST = 5
"""Norms of a worker that must have been seen before one is called an outlier."""
_LEAST_DEVIATION = 0.1
"""Of the mean: a few norms that happen to agree do not make the next one an outlier."""
_HEAD = 3
"""Columns of the table of a meeting before the norms: steps, learning rates, whether to save."""


class Norms:
    """How the norms of each worker's pseudo-gradients of a layer usually are.

    An exponentially weighted mean and variance for each worker (smoothing 0.02; a plain mean while
    there are fewer than 50). An outlier counts as three deviations, so that it moves them little.

    Attributes:
        table: ``[3, workers]`` float64: how many were seen, mean, variance.
    """

    def __init__(self, workers: int) -> None:
        self.table = torch.zeros(3, workers, dtype=torch.float64)

    def judge(self, norms: Tensor) -> Tensor:
        """``[workers]`` bool: more than three deviations above the mean, or not finite.

        Args:
            norms: ``[workers]`` float64 of this meeting; 0 of a worker that made no step.
        """
        seen, mean, variance = self.table
        deviation = torch.maximum(variance.sqrt(), _LEAST_DEVIATION * mean)
        most = torch.where(seen >= _FEWEST, mean + _MOST_DEVIATIONS * deviation, torch.inf)
        outlier = ~norms.isfinite() | (norms > most)
        counted = norms.isfinite() & (norms > 0)
        smoothing = torch.clamp(1 / (seen + 1), min=_SMOOTHING)
        change = torch.where(counted, torch.minimum(norms, most) - mean, 0.0)
        grown = (1 - smoothing) * (variance + smoothing * change**2)
        self.table = torch.stack(
            [
                seen + counted,
                mean + smoothing * change,
                torch.where(counted, grown, variance),
            ]
        )
        return outlier


def weights_of(norms: Tensor, left_out: Tensor, steps: Tensor, steps_share: float) -> Tensor:
    """``[workers]`` float64: the softmax of minus the norms, mixed with the share of steps; they
    add up to 1, or are all 0 where everybody is left out.

    Args:
        norms: ``[workers]`` float64.
        left_out: ``[workers]`` bool.
        steps: ``[workers]`` float64, made since the last meeting.
        steps_share: 0 = the softmax alone.
    """
    if bool(left_out.all()):
        return torch.zeros_like(norms)
    smooth = (-norms).masked_fill(left_out, -torch.inf).softmax(dim=0)
    counted = steps.masked_fill(left_out, 0.0)
    return (1 - steps_share) * smooth + steps_share * counted / counted.sum()


@dataclass(frozen=True)
class Met:
    """What workers have agreed on at the beginning of a meeting."""

    steps: list[int]
    """That each worker has made since the last one."""
    save: bool
    """Whether the state is to be saved now."""
    left_out: int
    """Pseudo-gradients, over layers and workers, that do not count."""
    broken: bool
    """Whether this worker's masks had become infinite or no numbers."""


class Edit:
    """What a worker remembers between meetings, and how it takes part in one.

    Args:
        routers: mask routers ``[E, H]`` by layer, the same for all workers now.
        exchange: with the other workers.
        steps_share: see :func:`weights_of`.
    """

    def __init__(
        self, routers: Mapping[int, Parameter], exchange: Exchange, steps_share: float
    ) -> None:
        self.routers, self.exchange, self.steps_share = routers, exchange, steps_share
        self.last = {
            i: Parameter(router.detach().cpu().clone(), requires_grad=False)
            for i, router in routers.items()
        }
        """What all had after the last meeting, on the CPU."""
        self.outer = {
            i: torch.optim.SGD([last], lr=OUTER_RATE, momentum=OUTER_MOMENTUM, nesterov=True)
            for i, last in self.last.items()
        }
        self.norms = {i: Norms(exchange.size) for i in routers}
        self._open: list[int] = []
        """Layers whose meeting has not ended, in order."""
        self._weights: dict[int, Tensor] = {}
        self._sums: dict[int, Sum] = {}
        self._rates = torch.zeros(exchange.size, dtype=torch.float64)

    @torch.no_grad()
    def meet(self, steps: int, rates: float, save: bool) -> Met:
        """Begin a meeting: agree on weights, and send the first layer.

        Args:
            steps: that this worker has made since the last one.
            rates: the sum of their learning rates.
            save: whether this worker wants the state to be saved; only the first one's word counts.

        Returns:
            What was agreed on.
        """
        self._open = list(self.last)
        norms = [
            float(self._delta(i).double().square().mean().sqrt()) / rates if steps else 0.0
            for i in self._open
        ]
        row = torch.tensor([steps, rates, save, *norms], dtype=torch.float64)
        table = self.exchange.gather(row)
        self._rates = table[:, 1]
        left_out = 0
        for column, i in enumerate(self._open, start=_HEAD):
            outlier = self.norms[i].judge(table[:, column])
            left_out += int(outlier.sum())
            self._weights[i] = weights_of(
                table[:, column], outlier | (table[:, 0] == 0), table[:, 0], self.steps_share
            )
        self._send(self._open[0])
        own = table[self.exchange.rank]
        return Met(
            steps=[int(count) for count in table[:, 0]],
            save=bool(table[0, 2]),
            left_out=left_out,
            broken=not bool(own.isfinite().all()),
        )

    @torch.no_grad()
    def settle(self, layer: int) -> None:
        """End the meeting for a layer, which is about to be used; nothing if it has ended.

        The next layer is sent before this one is waited for, so that it travels while this one
        computes, and no more than two layers are under way.
        """
        if layer not in self._open:
            return
        self._open.remove(layer)
        self._send(layer)
        if self._open:
            self._send(self._open[0])
        delta, weights = self._sums.pop(layer).wait(), self._weights.pop(layer)
        last = self.last[layer]
        if bool(weights.any()):
            most = MOST_NORM * float(weights @ self._rates)
            norm = float(delta.square().mean().sqrt())
            last.grad = delta * min(1.0, most / norm) if norm else delta
            self.outer[layer].step()
            last.grad = None
        self.routers[layer].copy_(last)

    def settle_all(self) -> None:
        """End the meeting for all layers."""
        for layer in list(self._open):
            self.settle(layer)

    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved, by name and layer; between meetings, when nobody has stepped."""
        found = {f"norms.{i}": norms.table for i, norms in self.norms.items()}
        for i, outer in self.outer.items():
            momentum = outer.state[self.last[i]].get("momentum_buffer")
            if momentum is not None:
                found[f"outer.{i}"] = momentum
        return found

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`tensors`; the routers have been restored before."""
        for i, norms in self.norms.items():
            norms.table = saved[f"norms.{i}"].clone()
            if (momentum := saved.get(f"outer.{i}")) is not None:
                self.outer[i].state[self.last[i]]["momentum_buffer"] = momentum.clone()

    def _delta(self, layer: int) -> Tensor:
        """``[E, H]``, on the CPU: this worker's pseudo-gradient."""
        return self.last[layer] - self.routers[layer].detach().cpu()

    def _send(self, layer: int) -> None:
        """Begin to add up a layer's weighted pseudo-gradients, if that has not begun."""
        if layer in self._sums:
            return
        weight = float(self._weights[layer][self.exchange.rank])
        delta = self._delta(layer)
        # one that is left out may not be finite
        own = (delta * weight if weight else torch.zeros_like(delta)).contiguous()
        self._sums[layer] = self.exchange.start_sum(own)
