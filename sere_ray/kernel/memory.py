"""What the kernels read and write in device memory, and how the host writes it."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import REROUTABLE, Layer
from sere_ray.rules.gate import PLAIN, Gate
from sere_ray.rules.margin import WEIGHT_UNIT, demand_units
from sere_ray.rules.spare import Modes, modes_of

_MODES = {"off": 0, "observe": 1, "on": 2}
_RULES = {"none": 0, "sere": 0, "margin": 1, "spare": 2}
"""``none`` is ``sere`` with all slots primary."""
ALL_KEPT, MASKED, FIRST_KEPT = range(3)
"""What learned masks do in a layer: nothing; leave slots out; leave out all but first choices."""
_SETTINGS = struct.Struct("iiiiifiiffibbbbfffi")
_ANY_DEMAND = 2**31 - 1
"""More than can be given up: nobody knows what is too much."""
OWN_COUNTERS = 6
"""Fields of :class:`sere_ray.rules.RuleCounts`, slots that others of their row took over, then
steps that gave up more demand than calibration saw."""
MASKED_COUNTERS = 7
"""Those, then slots that masks left out: where the kernels have learned masks."""
NUM_COUNTERS = 8
"""Of several ranks, which have no masks: ``OWN_COUNTERS``, then experts that the busiest rank
reads, before and after the rule."""
_KIND_BITS = 2
"""Of a row's byte in device memory; above them what its weight lacks, as ``launch.cuh`` says."""
STEP = struct.Struct("iiiii12x")
"""What stands before the row kinds of a :class:`StepInput`; ``Step`` of launch.cuh."""


Statistics = Mapping[str, Tensor]
"""Further tensors of a layer by name, as an artifact holds them."""


class LayerTables(NamedTuple):
    """What calibration says of one layer, as the kernel reads it."""

    neighbours: Tensor
    """``[E, stride]`` uint8 (uint16 above 256 experts): row u holds all experts in order of falling
    similarity to u, equal ones by index; so "the most similar member of a set" is "the first one
    in the set"."""
    similarity: Tensor
    """``float32 [E, E]``; read only under a threshold."""
    stand_ins: Tensor
    """As ``neighbours``, by rising ``directed_loss``: of ``spare``, as is what follows. Both are
    empty without these statistics, and then that rule must not be set."""
    stand_in_of: Tensor
    """``float32 [E, stride, 2]``: ``directed_loss`` and ``directed_scale`` of each."""

    @classmethod
    def build(
        cls, similarity: Tensor, device: torch.device, statistics: Statistics | None = None
    ) -> "LayerTables":
        """From tensors on any device.

        Args:
            similarity: ``float32 [E, E]``.
            device: of the kernels.
            statistics: of the layer.
        """
        stand_ins, stand_in_of = _stand_ins(statistics or {})
        return cls(
            torch.from_numpy(_in_order(-similarity.detach().cpu().numpy())).to(device),
            similarity.detach().to(device, torch.float32, copy=True).contiguous(),
            stand_ins.to(device),
            stand_in_of.to(device),
        )

    @classmethod
    def unread(cls, num_experts: int, device: torch.device) -> "LayerTables":
        """Of a layer about which nothing is known, for the rule ``none``: launches fetch
        ``neighbours`` all the same."""
        order = torch.from_numpy(_in_order(np.zeros((num_experts, num_experts)))).to(device)
        empty = torch.zeros(0, device=device)
        return cls(order, empty, empty, empty)

    @property
    def has_stand_ins(self) -> bool:
        """Whether ``spare`` may be set."""
        return self.stand_ins.numel() > 0


def _in_order(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``[E, stride]``: row u holds all experts by rising number in ``matrix [E, E]``."""
    num_experts = len(matrix)
    kind = np.uint8 if num_experts <= 256 else np.uint16
    order = np.zeros((num_experts, padded_experts(num_experts)), kind)
    order[:, :num_experts] = np.argsort(matrix, axis=1, kind="stable")
    return order


def _stand_ins(statistics: Statistics) -> tuple[Tensor, Tensor]:
    if "directed_loss" not in statistics:
        return torch.zeros(0, dtype=torch.uint8), torch.zeros(0)
    loss, scale = (statistics[f"directed_{name}"].cpu().float() for name in ("loss", "scale"))
    order = torch.from_numpy(_in_order(loss.numpy()))
    index = order.long()
    pairs = torch.stack((loss.gather(1, index), scale.gather(1, index)), dim=-1)
    return order, pairs.contiguous()


class Settings:
    """The policy's numbers in device memory: a captured graph follows a change of them.

    Args:
        device: of the kernels.
        layers: a row for each.
        merges: whether slots that repeat an expert of their row become id -1, weight 0.
    """

    def __init__(self, device: torch.device, layers: int = 1, *, merges: bool = False) -> None:
        shape = (layers, _SETTINGS.size)
        self.merges = merges
        self.buffer = torch.zeros(shape, dtype=torch.uint8, device=device)

    def write(
        self,
        policy: BoundPolicy,
        *,
        top_k: int,
        num_experts: int,
        statistics: Sequence[Statistics] = (),
        masks: Sequence[int] = (),
    ) -> None:
        """Takes effect for everything that is launched afterwards on the current stream.

        Args:
            policy: the numbers.
            top_k: K.
            num_experts: E.
            statistics: of every layer, for a rule that reads them.
            masks: of every layer ``ALL_KEPT``, ``MASKED`` or ``FIRST_KEPT``; none: all are kept.
        """
        of_layers = statistics or [{}] * len(self.buffer)
        of_masks = masks or [ALL_KEPT] * len(self.buffer)

        def packed(bound: BoundPolicy) -> bytes:
            layers = [
                bound.of_layer(i, num_experts, None, None, of_layer)
                for i, of_layer in enumerate(of_layers)
            ]
            pairs = zip(layers, of_masks, strict=True)
            return b"".join(_pack(bound, layer, top_k, kept, self.merges) for layer, kept in pairs)

        self._policy = policy
        bounds = [policy, *(bound for _, bound in policy.by_rows)]
        self._packed = {bound: packed(bound) for bound in bounds}
        self._copy(policy)

    def follow(self, rows: int) -> None:
        """Have the policy's numbers for a step of so many re-routable rows from now on."""
        bound = self._policy.for_rows(rows)
        if bound is not self._written:
            self._copy(bound)

    def _copy(self, bound: BoundPolicy) -> None:
        _copy_to_device(self._packed[bound], self.buffer.view(-1))
        self._written = bound


def _pack(policy: BoundPolicy, layer: Layer, top_k: int, masks: int, merges: bool) -> bytes:
    identity = policy.rule == "none" or not 0 < layer.select_top_k < top_k
    # torch rounds to float32 as the reference does, beyond its range to infinity
    rho = float(torch.tensor(layer.threshold or 0.0, dtype=torch.float32))
    balances = policy.rule == "margin" and layer.balance_ranks
    modes = modes_of(layer) if policy.rule == "spare" else Modes(1.0, 0.0, True)
    return _SETTINGS.pack(
        _MODES[policy.mode],
        _RULES[policy.rule],
        top_k if identity else layer.select_top_k,
        min(max(layer.min_primary_experts, 0), layer.num_experts),
        layer.threshold is not None,
        rho,
        demand_units(layer.tau),
        min(layer.runners_up, layer.num_experts),
        layer.beta,
        layer.fill,
        merges,
        modes.protect,
        layer.guard,
        balances,
        masks,
        modes.lead,
        1 - modes.lead,
        modes.limit,
        _ANY_DEMAND if layer.most is None else layer.most,
    )


class StepInput:
    """Row kinds of the running step, and how many there are, in device memory."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.buffer = torch.zeros(STEP.size + max_rows, dtype=torch.uint8, device=device)
        self.rows = 0
        """Of the running step, without padding."""

    def write(
        self,
        kinds: np.ndarray[Any, np.dtype[np.int8]],
        counter_row: int,
        *,
        own: range | None = None,
        reroutable: int | None = None,
        weights: np.ndarray[Any, np.dtype[np.int64]] | None = None,
    ) -> int:
        """Copy without waiting, from pinned memory that torch keeps until the copy is done.

        Args:
            kinds: ``[rows]`` int8; every later row of the pass is padding.
            counter_row: 0 or 1, where the step is counted.
            own: rows whose slots are counted, where others are those of other ranks; None = all.
            reroutable: how many rows of the step are re-routable on any rank, where ``kinds``
                does not hold them all. With 0 the rule leaves the step alone.
            weights: ``[rows]`` int64 of 1 to ``WEIGHT_UNIT``, of drafts' demand;
                None = all are whole.

        Returns:
            How many rows of ``kinds`` are re-routable.
        """
        found = int(np.count_nonzero(kinds == REROUTABLE))
        own, self.rows = range(len(kinds)) if own is None else own, len(kinds)
        header = STEP.pack(
            len(kinds),
            found if reroutable is None else reroutable,
            counter_row,
            own.start,
            own.stop,
        )
        if weights is not None:
            kinds = kinds + (WEIGHT_UNIT - weights << _KIND_BITS).astype(np.int8)
        _copy_to_device(header + kinds.tobytes(), self.buffer)
        return found

    def clear(self) -> None:
        """No row of the next pass is anybody's: warm-up, capture, an idle rank."""
        self.buffer[: STEP.size].zero_()
        self.rows = 0


def _copy_to_device(content: bytes, buffer: Tensor) -> None:
    staged = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if buffer.is_cuda:
        staged = staged.pin_memory()
    buffer[: len(content)].copy_(staged, non_blocking=True)


class DeviceLayer(NamedTuple):
    """What a launch reads and writes of one layer, beside ids and weights."""

    tables: LayerTables
    settings: Tensor
    """This layer's row of :class:`Settings`."""
    step: StepInput
    counters: Tensor
    """int64 ``[2, OWN_COUNTERS]`` view: the layer's counters by step kind; over several ranks
    ``[2, NUM_COUNTERS]``, with masks ``[2, MASKED_COUNTERS]``."""
    gate: Gate = PLAIN
    """What the layer ranks experts by; its bias on the device, float32."""


def padded_experts(num_experts: int) -> int:
    """``STRIDE`` of launch.cuh: a power of two for each of 32 lanes."""
    return 32 * power_of_two(-(-num_experts // 32))


def power_of_two(least: int) -> int:
    """The smallest one that is not less."""
    return 1 << max(least - 1, 0).bit_length()
