"""A rule in one layer of the model, over many decode steps at once, and what its batches read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from sere_ray.calibration.collect import MoELayer
from sere_ray.evaluation.compiled_rules import compiled
from sere_ray.evaluation.gates import that_chose
from sere_ray.evaluation.lda import Affine, Moments
from sere_ray.masks.compose import after_masks
from sere_ray.masks.slots import LayerMask, kept_slots
from sere_ray.rules import REROUTABLE, RULES, Choice, Layer, name_dropped
from sere_ray.rules.common import named_by
from sere_ray.rules.demand import DEMAND_RULES
from sere_ray.rules.gate import Gate, scores_of
from sere_ray.util.errors import UnsupportedError

Floats = NDArray[np.float32]


@dataclass
class Counts:
    """Experts read by each of G batches: sums over layers of the mean over steps."""

    batches: int
    """G."""
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        self.reads: Any = 0.0
        self.slots: Any = 0.0
        self.busiest: dict[int, Any] = dict.fromkeys(self.ranks, 0.0)

    def add(self, read: Tensor, slots: Tensor) -> None:
        """Count a layer.

        Args:
            read: ``[D, G, E]`` bool.
            slots: ``[D, G, B, K]`` bool, those that an expert computes.
        """
        self.slots += slots.float().mean(dim=(0, 2, 3))
        self.reads += read.sum(dim=-1).float().mean(dim=0)
        for ranks in self.ranks:
            of_ranks = [part.sum(dim=-1) for part in read.tensor_split(ranks, dim=-1)]
            self.busiest[ranks] += torch.stack(of_ranks).amax(dim=0).float().mean(dim=0)

    def per_text(self, batch: int, layers: int) -> tuple[Floats, Floats, dict[int, Floats]]:
        """Means over layers for each text, ``[N]``: every text has the numbers of its batch.

        Returns:
            Experts read; the share of slots that an expert computes; and by number of ranks the
            experts that the busiest rank reads.
        """

        def spread(sums: Tensor) -> Floats:
            values: Floats = (sums / layers).repeat_interleave(batch).cpu().numpy()
            return values

        busiest = {ranks: spread(sums) for ranks, sums in self.busiest.items()}
        return spread(self.reads), spread(self.slots), busiest


class LayerRule:
    """A rule in one layer, over all decode steps of all batches at once.

    Attributes:
        gates: what the layer's gate may be.
        mask: what comes before the rule; None = nothing.
        affine: LDA's repair of the layer's output; None = none.
        moments: where set, the layer's output stays exact, and both outputs are added here.
        most_given_up: where set, the most demand that a step gave up, of rules with demand.
    """

    def __init__(
        self, rule: str, layer: Layer, module: MoELayer, gates: Sequence[Gate], counts: Counts
    ) -> None:
        self.name, self.rule = rule, RULES[rule]
        self.layer, self.module, self.counts = layer, module, counts
        self.gates = gates
        self.mask: LayerMask | None = None
        self.affine: Affine | None = None
        self.moments: Moments | None = None
        self.most_given_up: int | None = None
        self._constant: Tensor | None = None
        self._exact: Choice | None = None

    def __call__(self, index: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Choice:
        """New choice of ``[D, N, K]``; N rows are G batches of B."""
        steps, rows, _ = ids.shape
        shape = (steps, self.counts.batches, rows // self.counts.batches)
        of_batches = ids.view(*shape, -1)
        new_ids, new_weights = self._apply(
            index, hidden.view(*shape, -1), of_batches, weights.view(*shape, -1)
        )
        taken = torch.where(new_weights != 0, new_ids, -1)
        anybody = torch.ones(shape, dtype=torch.bool, device=ids.device)
        self.counts.add(named_by(taken, anybody, self.layer.num_experts), taken >= 0)
        if self.rule.output is not None:
            before, after = (of_batches, weights.view(*shape, -1)), (new_ids, new_weights)
            self._constant = self.rule.output(before, after, self.layer).view(steps, rows, -1)
        if self.moments is not None:
            self._exact = ids, weights
        named = name_dropped(new_ids, of_batches).clamp(min=0)  # a row may have kept nothing
        return named.view_as(ids), new_weights.view_as(weights)

    def after(self, hidden: Tensor, output: Tensor) -> Tensor:
        """The layer's output anew; ``hidden`` and ``output`` are ``[N * D, H]``, text by text."""

        def by_text(of_steps: Tensor) -> Tensor:
            return of_steps.transpose(0, 1).reshape(len(output), -1)

        if self._constant is not None:
            output = output + by_text(self._constant).to(output.dtype)
        if self.affine is not None:
            scale, shift = self.affine
            output = (output.float() * scale + shift).to(output.dtype)
        if self.moments is not None and self._exact is not None:
            exact: Tensor = self.module.experts.forward(hidden, *map(by_text, self._exact))
            self.moments.add(exact, output)
            return exact
        return output

    def _apply(self, index: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Choice:
        rule, layer = self.rule, self.layer
        scores = None
        if rule.needs_scores:
            logits = linear(hidden, self.module.gate_weight)
            gate = that_chose(self.gates, logits, ids, weights, index)
            if not (gate.is_plain or rule.any_gate):
                raise UnsupportedError(
                    f"layer {index}: this model's gate has a bias, groups or other scores than a "
                    "softmax, of which the peers' papers say nothing; compare sere and margin"
                )
            scores, layer = scores_of(logits, gate), replace(layer, gate=gate)
        kinds = torch.full(ids.shape[:-1], REROUTABLE, dtype=torch.int8, device=ids.device)
        if self.most_given_up is not None and scores is not None:
            of_rule = DEMAND_RULES[self.name]
            settled = of_rule.settle(layer)
            asked = of_rule.ask(ids, weights, scores, kinds, settled)
            given_up = int(of_rule.given_up(asked, settled).max())
            self.most_given_up = max(self.most_given_up, given_up)
        if self.mask is not None:
            if scores is not None and not layer.gate.is_plain:
                raise UnsupportedError(
                    f"layer {index}: this model's gate has a bias, groups or other scores than a "
                    f"softmax, behind which masks go with none and sere, not with {self.name}"
                )
            kept = kept_slots(hidden, ids, weights, kinds, self.mask)
            return after_masks(self.name, kept, ids, weights, scores, kinds, layer)
        fast = compiled(self.name, ids, weights, scores, layer)
        if fast is not None:
            return fast
        return rule.apply(ids, weights, scores, kinds, layer)


def linear_owner(num_experts: int, ranks: int) -> Tensor:
    """``[E]`` int64: vLLM's linear placement, larger shards first."""
    parts = torch.arange(num_experts).tensor_split(ranks)
    return torch.cat([torch.full_like(part, rank) for rank, part in enumerate(parts)])
