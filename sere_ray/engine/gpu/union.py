"""One union over the rows of all data-parallel ranks of a GPU engine.

Under data and expert parallelism every rank routes its own rows. vLLM's V2 runner already sums a
small table over ranks before every pass, on the host, to agree on its shape: a rank without
requests runs a dummy pass and takes part. Our numbers of a pass ride along in rows of that same
table (``rank_words.py``): the newest policy the rank knows, and the kinds of its rows. So there
is no collective of ours per pass, none that a rank could leave out, and no wait that stock lacks.
A new policy is used from the first pass on before which every rank was told.

In every layer, one of three ways, which the captured graphs hold from the start on:

- ``gathered``: vLLM gathers the ids of all ranks before its experts run (its default back end).
  Every rank re-routes all of them and so derives the same ids; for its Triton experts the same
  launch sorts the slots of the rank's own experts. Nothing is sent.
- ``before``: any other back end. A byte an expert, exchanged inside the launch where ranks reach
  each other's memory (``exchange.cuh``), else by an all-reduce MIN between two launches.
  And the rule ``margin`` with any back end, a SUM of an integer an expert: scores are not gathered.
- ``local``: ``union: local``, for comparison: each rank its own rows.

Where vLLM is changed for it: ``cuda_union_seam.py``.
"""

import logging
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.engine.gpu.rank_words import RankWords, read_words, write_words
from sere_ray.engine.gpu.state import CudaState, Deferred
from sere_ray.engine.state import BYTES, DECODE_ONLY, MIXED
from sere_ray.kernel import across_ranks
from sere_ray.kernel.across_ranks import NUM_COUNTERS, Placement
from sere_ray.kernel.launcher import MAX_ALIGNED_ROWS, Aligned
from sere_ray.kernel.memory import DeviceLayer, Settings, StepInput
from sere_ray.kernel.peers import Peers
from sere_ray.policy.bound import BoundPolicy
from sere_ray.policy.capabilities import check_change, check_swap
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, REROUTABLE
from sere_ray.util.errors import PolicyError, UnsupportedError

Way = Literal["gathered", "before", "local"]
logger = logging.getLogger("vllm.sere_ray")
NO_ROWS: NDArray[np.int8] = np.zeros(0, dtype=np.int8)
"""Row kinds of a dummy pass."""


@dataclass
class UnionCudaState(CudaState):
    """Row kinds of all ranks, and policies that switch between two passes.

    Attributes:
        rank: of this worker among the data-parallel ranks.
        num_ranks: data-parallel ranks.
        exchange: the minimum over ranks of a uint8 tensor, in place, on the current stream.
        add_up: likewise the sum of an int64 tensor.
        connect: gives what a kernel needs to exchange by itself, None where it cannot; a collective
            call, made in the first layer that needs it.
        before_dispatch: take the way ``before`` also where vLLM gathers; for measurements.
    """

    rank: int
    num_ranks: int
    exchange: Callable[[Tensor], None]
    add_up: Callable[[Tensor], None]
    connect: Callable[[], Peers | None]
    before_dispatch: bool = False

    def __post_init__(self) -> None:
        """Allocate everything graphs will point to; number the first policy 0."""
        shape = (2, len(self.artifact.layers), NUM_COUNTERS)
        self.gathered_counters = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.gathered_step = StepInput(self.max_rows * self.num_ranks, self.device)
        self.identity = Settings(self.device)  # of every layer
        self.slot_orders = torch.zeros(self.num_experts, dtype=torch.uint8, device=self.device)
        self.asked = torch.zeros(self.num_experts, dtype=torch.int64, device=self.device)
        self.version = 0
        super().__post_init__()
        self.policies = {0: self.bound}
        text = f"{self.bound.model_dump_json()} {_checksum_of(self.artifact.layers)}"
        self.checksum = zlib.crc32(text.encode())
        self.way: Way | None = None
        self.next_kinds = NO_ROWS
        self.placements: dict[int, Placement] = {}
        self.awaited: tuple[int, bool] | None = None  # layer, and whether its experts may be sorted
        self.gathered_steps = [0, 0]
        self.kernel(torch.int32).load(self.device, across_ranks.KERNELS)

    # --- policies ---------------------------------------------------------------------------------

    def apply_policy(self) -> None:
        """Copy the running policy to the device, behind every step launched so far."""
        super().apply_policy()
        sorts_only = BoundPolicy(
            mode="off" if self.bound.mode == "off" else "observe",
            select_top_k=self.top_k,
            threshold=None,
            min_primary_experts=0,
        )
        self.identity.write(sorts_only, top_k=self.top_k, num_experts=self.num_experts)

    def set_policy(self, value: object, artifact: bytes | None = None) -> Policy:
        """Set the policy from the first pass on before which every rank was told.

        All ranks must be told the same policies in the same order.

        Raises:
            PolicyError: the new policy is not valid, changes ``union`` (graphs hold where it is
                taken) or comes with an artifact. The rank then keeps what it has.
        """
        policy = self.check_policy(value, artifact)
        if artifact is not None:
            check_swap(policy.similarity, self.policy.similarity, on_gpu=True, several_ranks=True)
        check_change(policy, self.policy, on_gpu=True, several_ranks=True)
        self.version += 1
        self.policies[self.version] = policy.for_model(top_k=self.top_k)
        self.policy = policy
        text = self.policies[self.version].model_dump_json()
        self.checksum = zlib.crc32(text.encode(), self.checksum)
        return policy

    def _agree(self, ranks: list[RankWords]) -> None:
        """Run the newest policy that all ranks know. Raises on every rank alike."""
        versions = {of_rank.version for of_rank in ranks}
        if len(versions) == 1 and len({of_rank.checksum for of_rank in ranks}) > 1:
            raise PolicyError(
                f"sere: data-parallel ranks differ in their policies (number {min(versions)}) or "
                "in their similarity artifact; start all ranks with the same 'sere' key and set "
                "the same policies on all of them, in the same order"
            )
        common = min(versions)
        self.policies = {v: p for v, p in self.policies.items() if v >= common}
        if self.policies[common] is not self.bound:
            self.bound = self.policies[common]
            self.apply_policy()

    # --- a pass -----------------------------------------------------------------------------------

    def begin_step(self, kinds: NDArray[np.int8]) -> None:
        """Nothing: a pass begins when all ranks have agreed on it, in :meth:`begin_pass`."""

    def begin_dummy_step(self) -> None:
        """Nothing, as for :meth:`begin_step`: other ranks may have rows in it."""

    def words(self) -> NDArray[np.int32]:
        """What this rank tells the others before the pass it is about to run."""
        self.check_nothing_deferred()
        return write_words(self.version, self.checksum, self.next_kinds, self.max_rows)

    def begin_pass(self, table: NDArray[np.int32], sizes: list[int]) -> None:
        """Row kinds of the pass that all ranks launch next.

        Args:
            table: ``[words, ranks]``: what each rank told.
            sizes: ``[ranks]`` rows of each rank in the pass, with padding.
        """
        ranks = [read_words(column) for column in table.T]
        self._agree(ranks)
        kinds = np.zeros(sum(sizes), dtype=np.int8)
        first = np.cumsum([0, *sizes])
        for start, of_rank in zip(first, ranks, strict=False):
            kinds[start : start + len(of_rank.kinds)] = of_rank.kinds
        own = range(int(first[self.rank]), int(first[self.rank + 1]))
        kind = MIXED if bool((kinds == EXACT).any()) else DECODE_ONLY
        reroutable = self.gathered_step.write(kinds, kind, own=own)
        mine = ranks[self.rank].kinds
        own_rows = int(np.count_nonzero(mine == REROUTABLE))
        self.gathered_steps[kind] += bool(reroutable)
        if self.bound.union == "local":
            return super().begin_step(mine)
        self.settings.follow(reroutable)
        if reroutable:
            self.add_step(kind, own_rows, len(mine), None)
        if self.way != "gathered":
            self.step_input.write(mine, kind, reroutable=reroutable)

    # --- a layer ----------------------------------------------------------------------------------

    def route_layer(
        self,
        layer: int,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        placement: Placement | None,
        sorts: bool,
        logits: Tensor | None = None,
    ) -> None:
        """Re-route a layer's ids in place, or arrange for it to happen when they are gathered.

        Args:
            layer: decoder layer index.
            topk_ids: ``[T, K]`` of this rank's rows.
            topk_weights: ``[T, K]``.
            placement: where experts are if ids will be gathered; None if they will not.
            sorts: whether the experts may be given gathered ids sorted.
            logits: of :meth:`scores_of`.
        """
        gathers = placement is not None
        by_scores = self.bound.rule == "margin"
        way: Way = "gathered" if gathers and not (self.before_dispatch or by_scores) else "before"
        if self.bound.union == "local":
            way = "local"
        if self.way not in (None, way):
            raise UnsupportedError(
                f"sere: layer {layer} dispatches its rows in another way than layers before it; "
                "this model cannot be re-routed over several ranks: remove the 'sere' key"
            )
        self.way = way
        if way == "before":
            self.reroute_before_dispatch(layer, topk_ids, topk_weights, logits)
        elif way == "local":
            self.reroute_inplace(layer, topk_ids, topk_weights, logits)
        if placement is not None:
            self.placements[layer] = placement
            self.awaited = layer, sorts

    def reroute_before_dispatch(
        self, layer: int, topk_ids: Tensor, topk_weights: Tensor, logits: Tensor | None
    ) -> None:
        """Re-route this rank's rows by what all ranks name; a collective call."""
        of_layer = self.kernel(topk_ids.dtype), topk_ids, topk_weights, self.layer(layer)
        if self.bound.rule == "margin":
            assert logits is not None  # or scores_of() had refused the rule
            across_ranks.ask_of_ranks(*of_layer, logits, self.asked)
            self.add_up(self.asked)
            across_ranks.reroute_by_asked(*of_layer, logits, self.asked)
            return
        if self.peers:
            across_ranks.reroute_with_peers(*of_layer, self.peers)
        else:
            across_ranks.lowest_slot_orders(*of_layer, self.slot_orders)
            self.exchange(self.slot_orders)
            across_ranks.reroute_by_slot_orders(*of_layer, self.slot_orders)

    @cached_property
    def peers(self) -> Peers | None:
        """Connected in the first pass, which no graph captures."""
        peers = self.connect()
        how = "inside the kernel" if peers else "by an all-reduce in each layer"
        logger.info("sere-ray: %d ranks exchange their union %s", self.num_ranks, how)
        return peers

    def take_gathered(self, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """Re-route the rows of all ranks: now, or when the experts ask for them sorted."""
        assert self.awaited is not None
        (layer, sorts), self.awaited = self.awaited, None
        if sorts and topk_ids.shape[0] <= MAX_ALIGNED_ROWS:
            self.deferred = Deferred(layer, topk_ids, topk_weights)
        else:
            self._reroute_gathered(Deferred(layer, topk_ids, topk_weights))

    def align(
        self, topk_ids: Tensor, block_size: int, skips_foreign: bool = False
    ) -> Aligned | None:
        """See the base class; in the way ``before`` and ``local`` ids are only sorted, and counted.

        Where the experts want blocks of other ranks' experts, too, vLLM sorts.
        """
        held = self.deferred
        if held is None or held.topk_ids.data_ptr() != topk_ids.data_ptr():
            return None
        self.deferred = None
        if not skips_foreign:
            self._reroute_gathered(held)
            return None
        return across_ranks.reroute_gathered_and_align(
            *self._gathered_arguments(held), block_size=block_size
        )

    def _reroute_gathered(self, held: Deferred) -> None:
        across_ranks.reroute_gathered(*self._gathered_arguments(held))

    def _gathered_arguments(self, held: Deferred) -> tuple[Any, ...]:
        position = self.position[held.layer]
        rows = (self.settings.buffer[position], self.identity.buffer[0])
        settings = rows[self.way != "gathered"]
        counters = self.gathered_counters[:, position]
        layer = DeviceLayer(self.tables[held.layer], settings, self.gathered_step, counters)
        kernel = self.kernel(held.topk_ids.dtype)
        return kernel, held.topk_ids, held.topk_weights, layer, self.placements[held.layer]

    def check_nothing_deferred(self) -> None:
        """See the base class; what was to be gathered must have been."""
        super().check_nothing_deferred()
        if self.awaited is not None:
            raise UnsupportedError(
                f"sere: the ids of layer {self.awaited[0]} were not gathered where this version "
                "expects it; report this with the model's name and --all2all-backend"
            )

    # --- counters ---------------------------------------------------------------------------------

    def read_device_counters(self, *, reset: bool) -> NDArray[np.int64]:
        """See the base class; experts are those of all ranks, slots those of this rank's rows."""
        own = super().read_device_counters(reset=reset)
        counters: NDArray[np.int64] = self.gathered_counters.to("cpu", copy=True).numpy()
        if reset:
            self.gathered_counters.zero_()
        self._read = counters
        return counters if self.way == "gathered" else own[:, :, : self.counters.shape[2]]

    def read_bytes(self, *, reset: bool) -> list[dict[str, list[int] | None]]:
        """See the base class; vLLM sends inside captured graphs, where nobody counts."""
        return [dict.fromkeys(BYTES) for _ in range(2)]

    def read_counters(self, *, reset: bool) -> dict[str, Any]:
        """See the base class; under ``gathered``, what the experts of all ranks were asked for.

        For either kind of step: ``steps``, and per layer, summed over steps, ``experts_before`` and
        ``experts_read`` (distinct, over all ranks), ``busiest_before`` and ``busiest_read`` (of the
        rank that reads the most in that layer and step).
        """
        report = super().read_counters(reset=reset)
        report["gathered"] = {}
        for kind, name in ((DECODE_ONLY, "decode_only"), (MIXED, "mixed")):
            before, read, _, _, busiest_before, busiest_read = self._read[kind].T.tolist()
            report["gathered"][name] = {
                "steps": self.gathered_steps[kind],
                "experts_before": before,
                "experts_read": read,
                "busiest_before": busiest_before,
                "busiest_read": busiest_read,
            }
        if reset:
            self.gathered_steps = [0, 0]
        return report


def _checksum_of(layers: Mapping[int, Tensor]) -> int:
    value = 0
    for _, matrix in sorted(layers.items()):
        value = zlib.crc32(matrix.contiguous().cpu().numpy().tobytes(), value)
    return value
