"""What a policy costs in quality: teacher-forced rows, exact model against re-routed model.

A server computes prompt rows exactly, so its own scores of a given text cannot tell. Here B texts
advance together through the unmodified Hugging Face model: the first ``prompt_tokens`` positions
are exact (prefill), every later position is one decode step whose batch is the B rows of that
position. KV entries are the re-routed ones, as they would be in a server.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sere_ray.calibration.choices import changed_choices
from sere_ray.kernel.cpu_sere import reroute_and_count
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import REROUTABLE, Choice


def forward_changed(
    model: PreTrainedModel,
    input_ids: Tensor,
    prompt_tokens: int,
    change: Callable[[int, Tensor, Tensor, Tensor], Choice],
    past: Cache | None = None,
    after: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Logits ``[B, L, V]`` with other choices in the D = L - prompt_tokens decode steps.

    Args:
        model: the exact model.
        input_ids: ``[B, L]``.
        prompt_tokens: positions that stay exact.
        change: called in every MoE layer with its index, ``hidden_states [D, B, H]``,
            ``topk_ids [D, B, K]`` and ``topk_weights [D, B, K]``; returns the last two anew.
        past: KV entries of what comes before ``input_ids``; added to.
        after: called behind the experts of every MoE layer with its index, ``hidden_states
            [B * L, H]`` and ``output [B * L, H]`` of all positions; returns the output anew.
    """
    batch, length = input_ids.shape

    def steps(rows: Tensor) -> Tensor:
        """``[D, B, n]`` of ``[B * L, n]``."""
        return rows.view(batch, length, -1)[:, prompt_tokens:].transpose(0, 1).contiguous()

    def put_back(rows: Tensor, changed: Tensor) -> Tensor:
        all_rows = rows.view(batch, length, -1).clone()
        all_rows[:, prompt_tokens:] = changed.transpose(0, 1)
        return all_rows.view_as(rows)

    def change_rows(
        layer: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Choice:
        fields = (hidden_states, topk_ids, topk_weights)
        new_ids, new_weights = change(layer, *map(steps, fields))
        return put_back(topk_ids, new_ids), put_back(topk_weights, new_weights)

    with torch.inference_mode(), changed_choices(model, change_rows, after):
        logits: Tensor = model(
            input_ids=input_ids, past_key_values=past, use_cache=past is not None
        ).logits
    return logits


@dataclass
class Reads:
    """Experts read per layer and decode step, summed."""

    layer_steps: int = 0
    experts_before: int = 0
    experts_after: int = 0


class LayerRows(NamedTuple):
    """What one layer computed: D decode steps of B rows."""

    hidden_states: Tensor
    """``[D, B, H]``, its input."""
    gate_ids: Tensor
    """``[D, B, K]``, before the rule."""
    topk_ids: Tensor
    """``[D, B, K]``, after it."""
    topk_weights: Tensor
    """``[D, B, K]``."""


@dataclass
class Rerouter:
    """Applies a policy of the rule ``sere`` to the rows of one batch inside a Hugging Face model.

    Attributes:
        policy: the rule's numbers; mode ``off`` and ``observe`` leave the model exact.
        similarity: decoder layer index -> ``float32 [E, E]``.
        prompt_tokens: positions before this one are exact.
        on_layer: takes every layer's rows, of decode steps alone.
    """

    policy: BoundPolicy
    similarity: Mapping[int, Tensor]
    prompt_tokens: int
    on_layer: Callable[[int, LayerRows], None] | None = None
    reads: Reads = field(default_factory=Reads)

    def forward(self, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        """Logits ``[B, L, V]`` of ``input_ids [B, L]`` under the policy."""
        return forward_changed(model, input_ids, self.prompt_tokens, self._choose)

    def scored(
        self, model: PreTrainedModel, input_ids: Tensor, batch: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """Texts of ``input_ids [N, L]`` that advance together, and what follows their prompts.

        Yields:
            Which texts, and their logits ``[batch, L - prompt_tokens, V]``.
        """
        for start in range(0, len(input_ids), batch):
            rows = slice(start, start + batch)
            yield rows, self.forward(model, input_ids[rows])[:, self.prompt_tokens :]

    def _choose(
        self, layer: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Choice:
        new_ids = self._reroute(layer, topk_ids, topk_weights)
        if self.on_layer is not None:
            self.on_layer(layer, LayerRows(hidden_states, topk_ids, new_ids, topk_weights))
        return new_ids, topk_weights

    def _reroute(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """New ids ``[D, B, K]``, step by step."""
        rows = torch.full((topk_ids.shape[1],), REROUTABLE, dtype=torch.int8)
        policy = self.policy.for_rows(len(rows))
        new_ids = topk_ids.clone()
        for step, (ids, weights) in enumerate(zip(topk_ids, topk_weights, strict=True)):
            of_step, counts = reroute_and_count(
                ids,
                weights,
                self.similarity[layer],
                rows,
                select_top_k=policy.select_top_k,
                threshold=policy.threshold,
                min_primary_experts=policy.min_primary_experts,
            )
            self.reads.layer_steps += 1
            self.reads.experts_before += counts.experts_before
            self.reads.experts_after += counts.experts_after
            if self.policy.mode == "on":
                new_ids[step] = of_step
        return new_ids


def divergence(exact: Tensor, logits: Tensor) -> Tensor:
    """``[N, D]``: KL(exact || logits), nats; ``exact`` are log-probabilities in float64."""
    return (exact.exp() * (exact - logits.double().log_softmax(dim=-1))).sum(dim=-1)


def exact_logits(model: PreTrainedModel, input_ids: Tensor, prompt_tokens: int) -> Tensor:
    """Logits ``[N, L - prompt_tokens, V]`` of the exact model on the scored positions."""
    with torch.inference_mode():
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits[:, prompt_tokens:]
