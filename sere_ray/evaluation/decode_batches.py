"""Any rule on held-out text: B texts advance together, as the rows of a server's decode step.

Prompts are exact and computed once. After them every position is one decode step of B rows, with
the re-routed KV entries before it: see :mod:`sere_ray.evaluation.teacher_forced`. Batches that
know nothing of each other share a forward pass.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sere_ray.calibration.collect import find_moe_layers
from sere_ray.evaluation.gates import candidates
from sere_ray.evaluation.layer_rule import Counts, Floats, LayerRule, linear_owner
from sere_ray.evaluation.lda import Moments, Repair
from sere_ray.evaluation.settings import BoundSetting
from sere_ray.evaluation.teacher_forced import forward_changed
from sere_ray.masks.artifact import MasksArtifact
from sere_ray.masks.slots import LayerMask
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import Choice


@dataclass(frozen=True)
class Measured:
    """A setting at one batch size, on N texts with D scored positions each."""

    kl: Floats
    """``[N, D]`` KL(exact || re-routed), nats."""
    agreement: Floats
    """``[N, D]`` 1 where the most likely token is the exact model's."""
    loss: Floats
    """``[N, D - 1]`` negative log-likelihood of the text's own next token."""
    delta_p: Floats
    """``[N, D - 1]`` how much more likely that token is than under the exact model, -1..1."""
    reads: Floats
    """``[N]`` distinct experts per layer and step of the batch that the text was in."""
    rows_share: Floats
    """``[N]`` of that batch's slots the share that an expert computes: the others are dropped."""
    busiest: dict[int, Floats]
    """Number of ranks -> ``[N]``, the same of the rank that reads the most, linear placement."""

    @classmethod
    def join(cls, parts: "list[Measured]") -> "Measured":
        """The texts of several, in order."""
        of_texts = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("kl", "agreement", "loss", "delta_p", "reads", "rows_share")
        }
        busiest = {
            ranks: np.concatenate([part.busiest[ranks] for part in parts])
            for ranks in parts[0].busiest
        }
        return cls(**of_texts, busiest=busiest)


@dataclass(frozen=True)
class Predictions:
    """What a model says of the texts' own tokens, those that a decode row predicts."""

    log_p: Floats
    """``[N, D - 1]`` their log-likelihood; the first is the second token after the prompt."""
    hits: NDArray[np.bool_]
    """``[N, D - 1]`` whether they are the most likely ones."""
    reads: float
    """Mean distinct experts per layer and step; NaN where they were not counted."""
    rows_share: float
    """Share of slots that an expert computes; NaN as well."""


class DecodeBatches:
    """N texts whose exact logits and prompts are computed; measures settings on them.

    Args:
        model: the exact model.
        input_ids: ``[N, L]``.
        prompt_tokens: positions that are exact and not scored.
        similarity: decoder layer index -> ``[E, E]`` float32.
        ranks: numbers of expert-parallel ranks, for ``busiest``.
        statistics: decoder layer index -> further tensors by name, for rules that read them.
        masks: learned masks by path, for settings that name them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        prompt_tokens: int,
        similarity: Mapping[int, Tensor],
        ranks: tuple[int, ...] = (1,),
        statistics: Mapping[int, Mapping[str, Tensor]] | None = None,
        masks: Mapping[str, MasksArtifact] | None = None,
    ) -> None:
        self.model, self.ranks, self.masks = model, ranks, masks or {}
        self.layers, self.config = find_moe_layers(model), model.config.get_text_config()
        self.similarity = {layer: matrix.to(model.device) for layer, matrix in similarity.items()}
        self.statistics = {
            layer: {name: tensor.to(model.device) for name, tensor in named.items()}
            for layer, named in (statistics or {}).items()
        }
        self.ids = input_ids.to(model.device)
        self.answers = self.ids[:, prompt_tokens:]
        with torch.inference_mode():
            self.prompt: Cache = model(self.ids[:, :prompt_tokens], use_cache=True).past_key_values
            self.exact = self._forward({}).log_softmax(dim=-1)

    def measure(
        self, policy: BoundPolicy, batch: int, ranks: int = 1, repair: Repair | None = None
    ) -> Measured:
        """Run a policy with ``batch`` rows a step; N is a multiple of it.

        Args:
            policy: what to run.
            batch: B.
            ranks: what a rule that looks at ranks takes for their number.
            repair: of :meth:`fit`; None = the layers' outputs stay as the rule makes them.

        Raises:
            UnsupportedError: its rule reads scores that this model's gate does not choose by.
        """
        found, counts = self._run(policy, batch, ranks, repair)
        kl = (self.exact.exp() * (self.exact - found)).sum(dim=-1)
        agreement = found.argmax(dim=-1) == self.exact.argmax(dim=-1)
        log_p, exact = self._of_text(found), self._of_text(self.exact)
        reads, rows_share, busiest = counts.per_text(batch, len(self.layers))
        return Measured(
            kl=_numpy(kl),
            agreement=_numpy(agreement),
            loss=_numpy(-log_p),
            delta_p=_numpy(log_p.exp() - exact.exp()),
            reads=reads,
            rows_share=rows_share,
            busiest=busiest,
        )

    def most_given_up(self, policy: BoundPolicy, batch: int) -> list[int]:
        """By layer the most demand that a step gave up under a policy with demand, in units."""
        _, rules = self.rules_of(policy, len(self.ids), batch)
        for rule in rules.values():
            rule.most_given_up = 0
        self._forward(rules)
        return [rule.most_given_up or 0 for rule in rules.values()]

    def predictions(self, policy: BoundPolicy | None, batch: int) -> Predictions:
        """What is said of the texts with ``batch`` rows a step; None = by the exact model.

        Raises:
            UnsupportedError: its rule reads scores that this model's gate does not choose by.
        """
        if policy is None:
            return self._said(self.exact, None, batch)
        return self._said(*self._run(policy, batch), batch)

    def predictions_with_kl(self, policy: BoundPolicy, batch: int) -> tuple[Predictions, Floats]:
        """The same under a policy, and ``[N, D - 1]`` KL(exact || re-routed) of these rows."""
        found, counts = self._run(policy, batch)
        kl = (self.exact.exp() * (self.exact - found)).sum(dim=-1)[:, :-1]
        return self._said(found, counts, batch), _numpy(kl)

    def _said(self, found: Tensor, counts: "Counts | None", batch: int) -> Predictions:
        reads = share = float("nan")
        if counts is not None:
            per_text = counts.per_text(batch, len(self.layers))
            reads, share = (float(values.mean()) for values in per_text[:2])
        hits = found[:, :-1].argmax(dim=-1) == self.answers[:, 1:]
        return Predictions(_numpy(self._of_text(found)), hits.cpu().numpy(), reads, share)

    def _run(
        self, policy: BoundPolicy, batch: int, ranks: int = 1, repair: Repair | None = None
    ) -> "tuple[Tensor, Counts]":
        """``[N, D, V]`` log-probabilities under a policy, and what was read."""
        counts, rules = self.rules_of(policy, len(self.ids), batch, ranks)
        for layer, affine in (repair or {}).items():
            rules[layer].affine = affine
        return self._forward(rules).log_softmax(dim=-1), counts

    def _of_text(self, log_p: Tensor) -> Tensor:
        """``[N, D - 1]`` of ``[N, D, V]``: those of the text's own next tokens."""
        return log_p[:, :-1].gather(-1, self.answers[:, 1:, None]).squeeze(-1)

    def rules_of(
        self, policy: BoundPolicy, texts: int, batch: int, ranks: int = 1
    ) -> "tuple[Counts, dict[int, LayerRule]]":
        """A policy in every layer, for batches of some texts, and what they will have read."""
        counts = Counts(texts // batch, self.ranks)
        policy, rules = policy.for_rows(batch), {}
        for i, (layer, module) in enumerate(self.layers.items()):
            experts, similarity = len(module.gate_weight), self.similarity.get(layer)
            owner, statistics = linear_owner(experts, ranks), self.statistics.get(layer)
            knobs = policy.of_layer(i, experts, similarity, owner, statistics)
            gates = candidates(self.config, module.selection_bias, experts)
            rules[layer] = LayerRule(policy.rule, knobs, module, gates, counts)
        for layer, mask in self._masks_of(policy).items():
            rules[layer].mask = mask
        return counts, rules

    def _masks_of(self, policy: BoundPolicy) -> dict[int, LayerMask]:
        """By layer, those that come before the policy's rule."""
        if not isinstance(policy, BoundSetting) or policy.masks is None:
            return {}
        path, device = policy.masks, self.model.device
        return self.masks[path].level(policy.level, path=path, device=device)

    def fit(self, policy: BoundPolicy, batch: int) -> dict[int, Moments]:
        """What LDA's repair of a policy needs, by layer; earlier layers stay exact."""
        _, rules = self.rules_of(policy, len(self.ids), batch)
        for rule in rules.values():
            rule.moments = Moments()
        self._forward(rules)
        return {layer: rule.moments for layer, rule in rules.items() if rule.moments}

    def record(self, steps: int) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """What the exact model's layers saw and chose at some steps, evenly spread.

        Returns:
            By layer ``hidden_states [S, N, H]``, ``topk_ids [S, N, K]``, ``topk_weights``.
        """
        seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def keep(layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Choice:
            every = max(1, len(ids) // steps)
            seen[layer] = (hidden[::every].clone(), ids[::every].clone(), weights[::every].clone())
            return ids, weights

        forward_changed(self.model, self.answers, 0, keep, copy.deepcopy(self.prompt))
        return seen

    def _forward(self, rules: "Mapping[int, LayerRule]") -> Tensor:
        """``[N, D, V]`` float32 logits after the prompts; exact without rules."""

        def change(layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Choice:
            return rules[layer](layer, hidden, ids, weights) if rules else (ids, weights)

        def after(layer: int, hidden: Tensor, output: Tensor) -> Tensor:
            return rules[layer].after(hidden, output) if rules else output

        past = copy.deepcopy(self.prompt)
        return forward_changed(self.model, self.answers, 0, change, past, after).float()


def _numpy(values: Tensor) -> Floats:
    array: Floats = values.float().cpu().numpy()
    return array
