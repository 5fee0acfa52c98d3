"""What every launch of an engine reads: matrices and the policy's numbers, in device memory."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sere_ray.kernel.launcher import RuleKernel
from sere_ray.kernel.limits import blocks_of_margin, max_aligned_rows
from sere_ray.kernel.memory import (
    ALL_KEPT,
    DeviceLayer,
    LayerTables,
    Settings,
    Statistics,
    StepInput,
)
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import RULES
from sere_ray.rules.gate import PLAIN, Gate
from sere_ray.util.errors import UnsupportedError


class DeviceRule:
    """Never moved once made, since captured graphs point to it.

    Args:
        layers: decoder layer index -> ``[E, E]`` float32, in the order of the counters; None =
            there is no artifact, so no rule may run that reads it.
        top_k: K.
        num_experts: E, logical experts.
        device: of this worker.
        bound: the first policy.
        statistics: decoder layer index -> further tensors by name, where the artifact has them.
        masks: what learned masks do in every layer above level 0, ``MASKED`` or ``FIRST_KEPT``;
            ``ALL_KEPT``: there are none.
    """

    def __init__(
        self,
        layers: Mapping[int, Tensor | None],
        top_k: int,
        num_experts: int,
        device: torch.device,
        bound: BoundPolicy,
        statistics: Mapping[int, Statistics] | None = None,
        masks: int = ALL_KEPT,
    ) -> None:
        self.top_k, self.num_experts, self.device = top_k, num_experts, device
        self.position = {layer: i for i, layer in enumerate(layers)}
        self._statistics = {layer: (statistics or {}).get(layer, {}) for layer in layers}
        unread = LayerTables.unread(num_experts, device)
        self.tables = {
            layer: unread
            if matrix is None
            else LayerTables.build(matrix, device, self._statistics[layer])
            for layer, matrix in layers.items()
        }
        self.masks = masks
        self.settings = Settings(device, len(layers))
        self.identity = Settings(device)
        """Of every layer whose ids are final when they are sorted: counts, and changes nothing."""
        self.merges: bool | None = None
        """Whether slots that name the same expert of a row are merged; None = no layer yet."""
        self.gates: Mapping[int, Gate] = {}
        """Decoder layer index -> what its gate ranks by, where that is known and not plain."""
        self.any_gate = False
        """Whether a layer has another gate than a plain one."""
        self.exact_layers: Collection[int] = ()
        """Layers that no rule changes."""
        self.write(bound)

    @property
    def rows(self) -> list[int]:
        """Rows of counters that count a layer with experts."""
        return list(self.position.values())

    def keep(self, layers: Collection[int]) -> None:
        """Take note of which layers have experts, where that was not known at the start."""
        self.position = {layer: self.position[layer] for layer in layers}

    def note_experts(self, layer_name: str, *, merges: bool) -> None:
        """Take note of what a layer's expert kernel needs; graphs are captured later.

        Args:
            layer_name: vLLM's.
            merges: whether repeated slots of a row have to be id -1, weight 0.

        Raises:
            UnsupportedError: layers before it need the contrary, or this one did when it was built.
        """
        if self.merges is None:
            self.merges = self.settings.merges = merges
            self.write(self._bound)
        elif self.merges != merges:
            raise UnsupportedError(
                f"sere: layer {layer_name!r} computes its experts with a kernel that takes rows of "
                "another form than layers before it; choose one --moe-backend for all of them"
            )

    def note_gates(self, gates: Mapping[int, Gate], exact_layers: Collection[int]) -> None:
        """Take note of gates once their weights are loaded; graphs are captured later.

        Args:
            gates: decoder layer index -> its gate.
            exact_layers: layers that no rule changes.
        """

        def on_device(gate: Gate) -> Gate:
            return gate if gate.bias is None else replace(gate, bias=gate.bias.to(self.device))

        self.gates = {layer: on_device(gate) for layer, gate in gates.items()}
        self.any_gate = any(not gate.is_plain for gate in gates.values())
        self.exact_layers = frozenset(exact_layers)

    def write_biases(self, gates: Mapping[int, Gate]) -> None:
        """Copy the biases of :meth:`note_gates` once more to where graphs read them."""
        for layer, gate in self.gates.items():
            new = gates[layer].bias
            if gate.bias is not None and new is not None:
                gate.bias.copy_(new)

    def of_layer(self, layer: int, step: StepInput, counters: Tensor) -> DeviceLayer:
        """What a launch reads and writes of a layer.

        Args:
            layer: decoder layer index.
            step: the rows.
            counters: ``[2, layers, counters]`` int64.
        """
        position = self.position[layer]
        is_exact = layer in self.exact_layers
        settings = self.identity.buffer[0] if is_exact else self.settings.buffer[position]
        gate = self.gates.get(layer, PLAIN)
        return DeviceLayer(self.tables[layer], settings, step, counters[:, position], gate)

    def kernel(
        self, id_dtype: torch.dtype, logit_dtype: torch.dtype = torch.bfloat16
    ) -> RuleKernel:
        """The kernel for ids of this type; where it chooses them, from logits of that type."""
        return RuleKernel(
            self.num_experts,
            self.top_k,
            id_dtype,
            logit_dtype=logit_dtype,
            any_gate=self.any_gate,
            masks=self.has_masks,
        )

    @property
    def has_masks(self) -> bool:
        """Whether launches are given the masks' logits, at every level."""
        return self.masks != ALL_KEPT

    def sorts(self, rows: int) -> bool:
        """Whether a launch also sorts the slots of so many rows by expert."""
        return rows <= max_aligned_rows(self.num_experts, self.top_k)

    def blocks(self, rows: int) -> int:
        """Blocks of a launch: for the rule that runs now, so a graph keeps those of its capture.

        A cluster of blocks waits for as many free multiprocessors, so only rules of demand have it.

        Args:
            rows: T.
        """
        return blocks_of_margin(rows, self.device) if RULES[self.rule].needs_scores else 1

    def write(self, bound: BoundPolicy) -> None:
        """Have a policy's numbers, behind every step launched so far."""
        self.rule, self._bound = bound.rule, bound
        statistics = list(self._statistics.values())
        self.settings.write(
            bound,
            top_k=self.top_k,
            num_experts=self.num_experts,
            statistics=statistics,
            masks=[self.masks if bound.level else ALL_KEPT] * len(statistics),
        )
        sorts_only = BoundPolicy(
            mode="off" if bound.mode == "off" else "observe",
            select_top_k=self.top_k,
            threshold=None,
            min_primary_experts=0,
        )
        self.identity.write(sorts_only, top_k=self.top_k, num_experts=self.num_experts)

    def write_matrices(
        self, layers: Mapping[int, Tensor], statistics: Mapping[int, Statistics]
    ) -> None:
        """Copy other matrices to where graphs read them, behind every step launched so far.

        The policy's numbers are to be written after it: some follow from statistics.

        Args:
            layers: decoder layer index -> ``[E, E]`` float32, of all layers.
            statistics: as at the start. Without those of then the former ones stay, unread.
        """
        self._statistics = {layer: statistics.get(layer, {}) for layer in self.tables}
        for layer, tables in self.tables.items():
            new = LayerTables.build(layers[layer], self.device, self._statistics[layer])
            for old_values, values in zip(tables, new, strict=True):
                if values.numel():
                    old_values.copy_(values)
