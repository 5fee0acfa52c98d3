"""Any rule on held-out text: B texts advance together, as the rows of a server's decode step.

Prompts are exact and computed once. After them every position is one decode step of B rows, with
the re-routed KV entries before it: see :mod:`sere_ray.evaluation.teacher_forced`. Batches that
know nothing of each other share a forward pass.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear
from transformers import Cache, PreTrainedModel

from sere_ray.calibration.collect import MoELayer, find_moe_layers
from sere_ray.evaluation.compiled_sere import compiled_sere
from sere_ray.evaluation.gates import candidates, that_chose
from sere_ray.evaluation.lda import Affine, Moments, Repair
from sere_ray.evaluation.teacher_forced import forward_changed
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import REROUTABLE, RULES, Choice, Layer, name_dropped
from sere_ray.rules.common import named_by
from sere_ray.rules.gate import Gate, scores_of
from sere_ray.util.errors import UnsupportedError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    """A setting at one batch size, on N texts with D scored positions each."""

    kl: Floats
    """``[N, D]`` KL(exact || re-routed), nats."""
    agreement: Floats
    """``[N, D]`` 1 where the most likely token is the exact model's."""
    loss: Floats
    """``[N, D - 1]`` negative log-likelihood of the text's own next token."""
    reads: Floats
    """``[N]`` distinct experts per layer and step of the batch that the text was in."""
    busiest: dict[int, Floats]
    """Number of ranks -> ``[N]``, the same of the rank that reads the most, linear placement."""

    @classmethod
    def join(cls, parts: "list[Measured]") -> "Measured":
        """The texts of several, in order."""
        of_texts = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("kl", "agreement", "loss", "reads")
        }
        busiest = {
            ranks: np.concatenate([part.busiest[ranks] for part in parts])
            for ranks in parts[0].busiest
        }
        return cls(**of_texts, busiest=busiest)


class DecodeBatches:
    """N texts whose exact logits and prompts are computed; measures settings on them.

    Args:
        model: the exact model.
        input_ids: ``[N, L]``.
        prompt_tokens: positions that are exact and not scored.
        similarity: decoder layer index -> ``[E, E]`` float32.
        ranks: numbers of expert-parallel ranks, for ``busiest``.
        statistics: decoder layer index -> further tensors by name, for rules that read them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        prompt_tokens: int,
        similarity: Mapping[int, Tensor],
        ranks: tuple[int, ...] = (1,),
        statistics: Mapping[int, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.model, self.ranks = model, ranks
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
        counts, rules = self.rules_of(policy, len(self.ids), batch, ranks)
        for layer, affine in (repair or {}).items():
            rules[layer].affine = affine
        logits = self._forward(rules)
        found = logits.log_softmax(dim=-1)
        kl = (self.exact.exp() * (self.exact - found)).sum(dim=-1)
        agreement = found.argmax(dim=-1) == self.exact.argmax(dim=-1)
        loss = -found[:, :-1].gather(-1, self.answers[:, 1:, None]).squeeze(-1)
        reads, busiest = counts.per_text(batch, len(self.layers))
        return Measured(_numpy(kl), _numpy(agreement), _numpy(loss), reads, busiest)

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
        return counts, rules

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


@dataclass
class Counts:
    """Experts read by each of G batches: sums over layers of the mean over steps."""

    batches: int
    """G."""
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        self.reads: Any = 0.0
        self.busiest: dict[int, Any] = dict.fromkeys(self.ranks, 0.0)

    def add(self, read: Tensor) -> None:
        """Count a layer; ``read [D, G, E]`` bool."""
        self.reads += read.sum(dim=-1).float().mean(dim=0)
        for ranks in self.ranks:
            of_ranks = [part.sum(dim=-1) for part in read.tensor_split(ranks, dim=-1)]
            self.busiest[ranks] += torch.stack(of_ranks).amax(dim=0).float().mean(dim=0)

    def per_text(self, batch: int, layers: int) -> tuple[Floats, dict[int, Floats]]:
        """Means over layers for each text, ``[N]``: every text has the numbers of its batch.

        Returns:
            Experts read, and by number of ranks those that the busiest rank reads.
        """

        def spread(sums: Tensor) -> Floats:
            values: Floats = (sums / layers).repeat_interleave(batch).cpu().numpy()
            return values

        return spread(self.reads), {ranks: spread(sums) for ranks, sums in self.busiest.items()}


class LayerRule:
    """A rule in one layer, over all decode steps of all batches at once.

    Attributes:
        gates: what the layer's gate may be.
        affine: LDA's repair of the layer's output; None = none.
        moments: where set, the layer's output stays exact, and both outputs are added here.
    """

    def __init__(
        self, rule: str, layer: Layer, module: MoELayer, gates: Sequence[Gate], counts: Counts
    ) -> None:
        self.rule, self.layer, self.module, self.counts = RULES[rule], layer, module, counts
        self.gates = gates
        self.affine: Affine | None = None
        self.moments: Moments | None = None
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
        self.counts.add(named_by(taken, anybody, self.layer.num_experts))
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
        if rule.apply is RULES["sere"].apply and ids.device.type == "cpu":
            return compiled_sere(ids, weights, layer)
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
        return rule.apply(ids, weights, scores, kinds, layer)


def linear_owner(num_experts: int, ranks: int) -> Tensor:
    """``[E]`` int64: vLLM's linear placement, larger shards first."""
    parts = torch.arange(num_experts).tensor_split(ranks)
    return torch.cat([torch.full_like(part, rank) for rank, part in enumerate(parts)])
