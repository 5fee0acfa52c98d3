"""One union over the rows of all data-parallel ranks of a CPU engine.

Under data and expert parallelism every rank routes its own rows. Two all-reduces make all of them
derive the same set of kept experts:

- once per pass, in its first MoE layer: :class:`Header`, a few numbers, and each rank's rows (MIN);
- in every MoE layer, before rows are dispatched: one byte per expert, the lowest rank of a slot
  in which a row names it (MIN); under the rule ``margin`` one integer per expert, what the rank's
  rows ask for (SUM).

vLLM already runs a pass on all ranks or on none, since dispatch is a collective too: an idle rank
runs dummy passes, warm-up included. So a dummy pass takes part here (``cpu_union_seam.py``) and
names nothing, and a collective that is left out is left out by all ranks for a reason they share.
"""

import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.dispatch import Greeting, naming_missing_ranks
from sere_ray.engine.cpu.dispatch import DispatchMeter, Routed, replace_dispatch
from sere_ray.engine.cpu.rules import count_choice, scores_of
from sere_ray.engine.cpu.state import CpuState
from sere_ray.engine.state import BYTES, DECODE_ONLY, MIXED
from sere_ray.kernel.cpu_sere import StepCounts, lowest_ranks, reroute_by_ranks
from sere_ray.policy.bound import BoundPolicy
from sere_ray.policy.capabilities import check_policy
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, PADDING, REROUTABLE, Choice, RuleCounts, margin, name_dropped
from sere_ray.util.errors import PolicyError, SereError

_NO_ROWS = 2**31
"""Above every number of rows."""


class Header(NamedTuple):
    """What ranks agree on once per pass: the minimum over ranks of each field."""

    version: int
    """Policies set so far; the lowest is the newest that every rank knows."""
    minus_version: int
    checksum: int
    """Of the artifact and of all policies set so far."""
    minus_checksum: int
    no_decode_row: int
    """0 if the rank has a re-routable row, else 1."""
    no_exact_row: int


class Staged(NamedTuple):
    """What a version runs."""

    bound: BoundPolicy
    similarity: dict[int, Tensor]


@dataclass
class UnionCpuState(CpuState):
    """Policy and matrices switch between two passes, at one that all ranks agree on.

    Attributes:
        group: the expert-parallel group, one rank per data-parallel rank.
        greeting: how to name ranks that are gone; None leaves torch's errors as they are.
    """

    group: dist.ProcessGroup
    greeting: Greeting | None = None

    def __post_init__(self) -> None:
        """Number the first policy 0."""
        super().__post_init__()
        self.version = 0
        self.staged = {0: Staged(self.bound, self.similarity)}
        self.checksum = _checksum(self.artifact, self.bound.model_dump_json())
        self.agreed = False
        self.group_decodes = False
        self.has_exact_row = False
        self.counter: tuple[int, int] | None = None  # step kind and position of the running layer
        self.gathered_bytes = np.zeros((2, len(self.layers)), dtype=np.int64)
        self.meter: DispatchMeter | None = None
        if self.startup.dispatch == "all_to_all":
            self.meter = DispatchMeter(len(self.layers), torch.device("cpu"))

    def set_policy(self, value: object, artifact: bytes | None = None) -> Policy:
        """Set policy and artifact from the first pass on before which every rank was told.

        All ranks must be told the same in the same order.

        Raises:
            PolicyError: as for the base class; the rank then keeps what it has.
            ArtifactError: likewise.
        """
        bound, similarity = self.bound, self.similarity
        newest = self.staged[self.version]
        self.similarity = newest.similarity
        try:
            policy = super().set_policy(value, artifact)
            self.version += 1
            self.staged[self.version] = Staged(self.bound, self.similarity)
            self.checksum = zlib.crc32(self.bound.model_dump_json().encode(), self.checksum)
            self.checksum = zlib.crc32(artifact or b"", self.checksum)
        finally:
            self.bound, self.similarity = bound, similarity
        return policy

    def begin(self, kinds: NDArray[np.int8]) -> None:
        """See the base class; ranks talk later, in the first layer, where all are in step."""
        super().begin(kinds)
        self.has_exact_row = bool((kinds == EXACT).any())
        self.agreed = False

    def check_supported(self, policy: Policy) -> None:
        """See the base class."""
        super().check_supported(policy)
        check_policy(policy, on_gpu=False, several_ranks=True)

    def before_layer(self, layer: int, topk_ids: Tensor) -> None:
        """See the base class; a collective call in the first layer of a pass."""
        if not self.agreed:
            self._agree()
        counted = self.has_decode_row()
        self.counter = (self.current_kind, self.position[layer]) if counted else None
        if self.meter is not None:
            is_padding = self.row_kind[: topk_ids.shape[0]] == PADDING
            self.meter.routed = Routed(topk_ids, is_padding, self.counter)

    def count_sent(self, size: int) -> None:
        """Count what vLLM's all-gather sends of the layer that was re-routed last."""
        if self.counter is not None:
            self.gathered_bytes[self.counter] += size

    def has_decode_row(self) -> bool:
        """See the base class; of any rank where the union is over all."""
        return super().has_decode_row() if self.bound.union == "local" else self.group_decodes

    def apply_rule(
        self, layer: int, topk_ids: Tensor, topk_weights: Tensor, kinds: Tensor
    ) -> tuple[Tensor, StepCounts]:
        """See the base class; collective where the union is over all ranks."""
        if self.bound.union == "local":
            return super().apply_rule(layer, topk_ids, topk_weights, kinds)
        similarity = self.similarity[layer]
        ranks = lowest_ranks(topk_ids, topk_weights, kinds, similarity.shape[0])
        self._reduce(ranks, dist.ReduceOp.MIN)
        arguments = self.rule_arguments(layer)
        if self.startup.check_ranks:
            self._compare(layer, ranks, **arguments)
        return reroute_by_ranks(topk_ids, ranks, similarity, kinds, **arguments)

    def apply_other_rule(
        self, layer: int, topk_ids: Tensor, topk_weights: Tensor, router_logits: Tensor
    ) -> tuple[Choice, StepCounts]:
        """See the base class; ``margin`` is collective where the union is over all ranks."""
        if self.bound.union == "local" or self.bound.rule != "margin":
            return super().apply_other_rule(layer, topk_ids, topk_weights, router_logits)
        kinds, knobs = self.row_kind[: topk_ids.shape[0]], self.knobs(layer)
        scores = scores_of(router_logits)
        asked = margin.ask(topk_ids, topk_weights, scores, kinds, knobs)
        self._reduce(asked, dist.ReduceOp.SUM)
        kept = margin.keep(asked, knobs)
        if self.startup.check_ranks:
            self._raise_if_different(layer, kept)
        new_ids, new_weights = margin.refill_rows(
            kept, topk_ids, topk_weights, scores, kinds, knobs
        )
        named = margin.is_named(asked)
        counts = count_choice(topk_ids, new_ids, kinds, named, kept, self.owner.get(layer))
        return (name_dropped(new_ids, topk_ids), new_weights), counts

    def _compare(self, layer: int, ranks: Tensor, **arguments: Any) -> None:
        """Raise on every rank alike if one of them sends a slot of some expert elsewhere."""
        slots = -(-len(ranks) // self.top_k) * self.top_k
        experts = torch.arange(slots, dtype=torch.int32, device="cpu").view(-1, self.top_k)
        experts[experts >= len(ranks)] = -1
        kinds = torch.full((len(experts),), REROUTABLE, dtype=torch.int8, device="cpu")
        targets, _ = reroute_by_ranks(experts, ranks, self.similarity[layer], kinds, **arguments)
        self._raise_if_different(layer, targets)

    def _raise_if_different(self, layer: int, derived: Tensor) -> None:
        checksum = zlib.crc32(derived.numpy().tobytes())
        fields = torch.tensor([checksum, -checksum], dtype=torch.int64, device="cpu")
        self._reduce(fields, dist.ReduceOp.MIN)
        if fields[0] != -fields[1]:
            raise SereError(
                f"sere.check_ranks: ranks re-route layer {layer} differently under policy number "
                f"{min(self.staged)}; their answers are wrong from here on: restart them, and "
                "report this"
            )

    def loaded(self) -> None:
        """See the base class: put the all-to-all in."""
        if self.meter is not None:
            replace_dispatch(self.attached, self.owner, self.meter, self.group, self.greeting)

    def read_counters(self, *, reset: bool) -> dict[str, Any]:
        """See the base class; with ``dispatch: all_to_all`` also what it moved.

        Returns:
            As the base class, and ``"dispatch": {"ranks", "row_bytes"}`` at the top; under each
            step kind ``"dispatch"``, see :meth:`DispatchMeter.read`. It counts what the other
            counters of a kind count.
        """
        report = super().read_counters(reset=reset)
        if self.meter is not None:
            report["dispatch"] = {"ranks": self.meter.ranks, "row_bytes": self.meter.row_bytes}
            kinds = self.meter.read(reset=reset)
            report["decode_only"]["dispatch"], report["mixed"]["dispatch"] = kinds
        return report

    def read_device_counters(self, *, reset: bool) -> NDArray[np.int64]:
        """See the base class; under ``union: local`` no rank knows what others read."""
        counters = super().read_device_counters(reset=reset)
        if self.bound.union == "local":
            return counters[:, :, : len(RuleCounts._fields)]
        return counters

    def read_bytes(self, *, reset: bool) -> list[dict[str, list[int] | None]]:
        """See the base class; an all-gather sends the same whatever the rule does."""
        if self.meter is not None:
            row = self.meter.row_bytes["dispatch"]
            return [
                {
                    f"bytes_dispatched_{w}": [n * row for n in of[f"rows_sent_{w}"]]
                    for w in ("before", "after")
                }
                for of in self.meter.read(reset=False)
            ]
        sums: list[list[int]] = self.gathered_bytes.tolist()
        if reset:
            self.gathered_bytes[:] = 0
        return [dict.fromkeys(BYTES, of_layers) for of_layers in sums]

    def count_step(
        self, kind: int, decode_rows: int, rows: int, seconds: float | None = None
    ) -> None:
        """Count a step on all ranks if it decodes a row on one of them."""
        if self.bound.union == "local":
            super().count_step(kind, decode_rows, rows, seconds)
        elif self.group_decodes:
            self.add_step(self.current_kind, decode_rows, rows, seconds)

    def _agree(self) -> None:
        """Exchange headers: the policy of this pass, and which kinds of rows it has anywhere."""
        mine = Header(
            self.version,
            -self.version,
            self.checksum,
            -self.checksum,
            int(self.decode_rows == 0),
            int(not self.has_exact_row),
        )
        # A place for each rank, which it alone fills: the minimum has the rows of all of them.
        rows = [_NO_ROWS] * self.group.size()
        rows[dist.get_rank(self.group)] = self.decode_rows
        fields = torch.tensor([*mine, *rows], dtype=torch.int64, device="cpu")
        self._reduce(fields, dist.ReduceOp.MIN)
        common = Header(*fields[: len(mine)].tolist())
        self._check(common)
        self.staged = {v: s for v, s in self.staged.items() if v >= common.version}
        self.bound, self.similarity = self.staged[common.version]
        self.group_decodes = not common.no_decode_row
        if self.bound.union == "global":
            self.current_kind = DECODE_ONLY if common.no_exact_row else MIXED
            self.union_rows = int(fields[len(mine) :].sum())
        self.agreed = True

    def _reduce(self, numbers: Tensor, operation: Any) -> None:
        with naming_missing_ranks(self.group, self.greeting):
            dist.all_reduce(numbers, operation, group=self.group)

    def _check(self, common: Header) -> None:
        """Raise on every rank alike, so that none is left waiting."""
        same_version = common.version == -common.minus_version
        if same_version and common.checksum != -common.minus_checksum:
            raise PolicyError(
                f"sere: data-parallel ranks differ in their policies (number {common.version}) or "
                "in their similarity artifact; start all ranks with the same 'sere' key and set "
                "the same policies on all of them, in the same order"
            )


def _checksum(artifact: SimilarityArtifact, policy: str) -> int:
    value = zlib.crc32(policy.encode())
    for _, matrix in sorted(artifact.layers.items()):
        value = zlib.crc32(matrix.contiguous().numpy().tobytes(), value)
    return value
