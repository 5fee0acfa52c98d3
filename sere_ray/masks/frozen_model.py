"""The frozen model with mask routers in it: gradients of a step, and how good masks are."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from sere_ray.calibration.choices import changed_choices
from sere_ray.calibration.collect import find_moe_layers
from sere_ray.masks.losses import (
    balance_penalty,
    batch_penalty,
    distance,
    slots_penalty,
    soft_masks,
    straight_through,
)
from sere_ray.masks.plan import TrainSettings
from sere_ray.rules import Choice
from sere_ray.util.errors import SereError

_CPU_FULL = "DefaultCPUAllocator"
"""In torch's message where the system gives it no memory."""


@dataclass(frozen=True)
class Validation:
    """What masks give on the validation windows, every row masked, prompts too."""

    kl_mean: float
    """KL to the exact model, nats."""
    slots_kept: dict[int, float]
    """Decoder layer index -> share of the slots that are kept."""
    experts_kept: dict[int, float]
    """Decoder layer index -> share of the experts that a batch of the exact model reads."""

    @property
    def slots_mean(self) -> float:
        """Mean over layers."""
        return sum(self.slots_kept.values()) / len(self.slots_kept)

    @property
    def experts_mean(self) -> float:
        """Mean over layers."""
        return sum(self.experts_kept.values()) / len(self.experts_kept)


class FrozenModel:
    """A model whose weights stay, and a mask router ``[E, H]`` for each MoE layer.

    A step is made of two halves, so that several workers can add up gradients between them:
    :meth:`add_gradients`, and what an optimizer does with ``routers``.

    Args:
        model: in eval mode; its parameters are frozen here.
        settings: of the training.
    """

    def __init__(self, model: PreTrainedModel, settings: TrainSettings) -> None:
        self.model, self.settings = model.requires_grad_(False), settings
        self.before_layer: Callable[[int], None] = lambda layer: None
        """Called in a step's pass before a layer's router is used."""
        self.layers = find_moe_layers(model)
        self.routers = {
            index: Parameter(
                torch.zeros(layer.gate_weight.shape, dtype=torch.float32, device=model.device)
            )
            for index, layer in self.layers.items()
        }

    def set_routers(self, weights: Mapping[int, Tensor]) -> None:
        """Take over weights ``[E, H]`` by decoder layer index."""
        with torch.no_grad():
            for index, router in self.routers.items():
                router.copy_(weights[index])

    def copy_of_routers(self) -> dict[int, Tensor]:
        """The weights as they are now, on the CPU."""
        return {index: router.detach().cpu().clone() for index, router in self.routers.items()}

    def add_gradients(self, windows: Tensor, knob: float) -> float:
        """Add the gradients of a step to the routers.

        Args:
            windows: ``[B, L]`` token ids.
            knob: weight of the penalty.

        Returns:
            KL to the exact model before the step, nats.

        Raises:
            SereError: the device has not memory enough.
        """
        with _enough_memory(self.settings.batch_size):
            exact = self._exact(windows)
            penalties: list[Tensor] = []
            of_batch = self.settings.batch, windows.shape[1]

            def change(layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Choice:
                self.before_layer(layer)
                soft = self._soft(layer, hidden, ids, weights)
                experts = len(self.routers[layer])
                if self.settings.penalty == "batch":
                    penalty = batch_penalty(soft, ids, experts, of_batch)
                else:
                    penalty = slots_penalty(soft)
                penalty = knob * penalty
                if self.settings.balance:
                    penalty = penalty + self.settings.balance * balance_penalty(soft, ids, experts)
                penalties.append(penalty)
                return ids, weights * straight_through(soft).to(weights.dtype)

            with changed_choices(self.model, change):
                logits = self._logits(windows)
            kl = distance(exact, logits)
            torch.autograd.backward(kl + torch.stack(penalties).mean())
        return float(kl.detach())

    @torch.no_grad()
    def validate(self, windows: Tensor) -> Validation:
        """What the routers give on windows ``[N, L]``; N is a multiple of a penalty's batch."""
        size = self.settings.batch
        slots: dict[int, list[float]] = {index: [] for index in self.layers}
        experts: dict[int, list[float]] = {index: [] for index in self.layers}
        distances = []

        def change(layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Choice:
            kept = (self._soft(layer, hidden, ids, weights) >= 0.5).to(weights.dtype)
            slots[layer].append(float(kept.float().mean()))
            # kept slots as soft masks of 0 and 1: then the expected share is the share itself
            shape = size, len(ids) // size
            share = batch_penalty(kept.float(), ids, len(self.routers[layer]), shape)
            experts[layer].append(float(share))
            return ids, weights * kept

        for batch in torch.split(windows, size):
            with _enough_memory(self.settings.batch_size):
                exact = self._exact(batch)
                with changed_choices(self.model, change):
                    logits = self._logits(batch)
            distances.append(float(distance(exact, logits)))

        def means(of_batches: dict[int, list[float]]) -> dict[int, float]:
            return {index: sum(values) / len(values) for index, values in of_batches.items()}

        return Validation(sum(distances) / len(distances), means(slots), means(experts))

    @torch.no_grad()
    def _exact(self, windows: Tensor) -> Tensor:
        """``[B, L, V]`` float32 log-probabilities of the model as it is."""
        return self._logits(windows).float().log_softmax(dim=-1)

    def _logits(self, windows: Tensor) -> Tensor:
        """``[B, L, V]`` of the model, with whatever choices stand in it now."""
        logits: Tensor = self.model(input_ids=windows.to(self.model.device), use_cache=False).logits
        return logits

    def _soft(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return soft_masks(
            hidden, ids, weights, self.routers[layer], keep_first=self.settings.keep_first
        )


@contextmanager
def _enough_memory(batch_size: int) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # a CPU that runs out has no exception of its own
        if not isinstance(error, torch.OutOfMemoryError) and _CPU_FULL not in str(error):
            raise
        raise SereError(
            f"--batch-size = {batch_size}: the device has not memory enough for a step; give a "
            "smaller one, or a shorter --length"
        ) from None
