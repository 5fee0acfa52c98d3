"""One union over the rows of all ranks of a GPU engine.

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
- ``before``: any other back end, and engines that record ids as they leave the router. A byte an
  expert, exchanged inside the launch where ranks reach each other's memory (``exchange.cuh``), else
  by an all-reduce MIN. Other rules with any back end: a SUM of integers, as no scores are gathered.
- ``local``: ``union: local``, for comparison: each rank its own rows.

Where vLLM is changed for it: ``union_patches.py``.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sere_ray.engine.counters import DECODE_ONLY, KIND_NAMES, MIXED
from sere_ray.engine.gpu.device_rule import DeviceRule
from sere_ray.engine.gpu.rank_group import RankGroup
from sere_ray.kernel import across_ranks
from sere_ray.kernel.across_ranks import Placement
from sere_ray.kernel.alignment import Aligned
from sere_ray.kernel.memory import NUM_COUNTERS, DeviceLayer, StepInput
from sere_ray.kernel.peers import Peers
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import EXACT, RULES
from sere_ray.util.errors import UnsupportedError

Way = Literal["gathered", "before", "local"]
logger = logging.getLogger("vllm.sere_ray")
NO_ROWS: NDArray[np.int8] = np.zeros(0, dtype=np.int8)  # row kinds of a dummy pass


class Gathered(NamedTuple):
    """A layer's ids of all ranks, before they are re-routed."""

    layer: int
    topk_ids: Tensor
    topk_weights: Tensor
    """``[T, K]`` each, in rank order."""
    sorts: bool
    """Whether the experts may be given them sorted."""


class UnionOfRanks:
    """What a rank knows of the rows of all ranks, and how a layer is re-routed over them.

    Args:
        group: the ranks.
        rule: of the engine.
        max_rows: most rows of a forward pass of one data-parallel rank.
    """

    def __init__(self, group: RankGroup, rule: DeviceRule, max_rows: int) -> None:
        self.group, self.rule = group, rule
        device, shape = rule.device, (2, len(rule.tables), NUM_COUNTERS)
        self.counters = torch.zeros(shape, dtype=torch.int64, device=device)
        self.step_input = StepInput(max_rows * group.num_ranks, device)
        self.slot_orders = torch.zeros(rule.num_experts, dtype=torch.uint8, device=device)
        self.asked = torch.zeros(rule.num_experts, dtype=torch.int64, device=device)
        self.way: Way | None = None
        self.next_kinds = NO_ROWS  # of this rank, in the pass that ranks are about to agree on
        self.placements: dict[int, Placement] = {}
        self.owners: dict[int, Tensor] = {}  # of a layer [E] uint8: rank of every expert
        self.read: Tensor | None = None  # [E] uint8, what all ranks read: see copies.py
        self.steps = [0, 0]
        self._expected: tuple[int, bool] | None = None  # layer, and whether its experts sort

    def load(self) -> None:
        """Compile and load the kernels, before a graph is captured that launches them."""
        copies = () if self.read is None else ("map_to_copies",)
        self.rule.kernel(torch.int32).load(self.rule.device, (*across_ranks.KERNELS, *copies))

    # --- a pass -----------------------------------------------------------------------------------

    def begin_pass(
        self, kinds_of_ranks: Sequence[NDArray[np.int8]], sizes: Sequence[int]
    ) -> tuple[int, int]:
        """Take over the row kinds of all ranks, in the layout in which vLLM gathers rows.

        Args:
            kinds_of_ranks: of each rank, ``[rows]`` int8.
            sizes: rows of each rank in the pass, with padding.

        Returns:
            The step's kind, and how many rows are re-routable on all ranks.
        """
        kinds = np.zeros(sum(sizes), dtype=np.int8)
        first = np.cumsum([0, *sizes])
        for start, of_rank in zip(first, kinds_of_ranks, strict=False):
            kinds[start : start + len(of_rank)] = of_rank
        own = range(int(first[self.group.rank]), int(first[self.group.rank + 1]))
        kind = MIXED if bool((kinds == EXACT).any()) else DECODE_ONLY
        reroutable = self.step_input.write(kinds, kind, own=own)
        self.steps[kind] += bool(reroutable)
        return kind, reroutable

    # --- a layer, before its rows are sent --------------------------------------------------------

    def choose_way(self, layer: int, bound: BoundPolicy, *, gathers: bool) -> Way:
        """The way of a layer, the same for all of them.

        Args:
            layer: decoder layer index.
            bound: the running policy.
            gathers: whether vLLM gathers the ids of all ranks.

        Raises:
            UnsupportedError: layers before it took another one.
        """
        by_scores = RULES[bound.rule].needs_scores
        early = self.group.before_dispatch or by_scores
        way: Way = "gathered" if gathers and not early else "before"
        if bound.union == "local":
            way = "local"
        if self.way not in (None, way):
            raise UnsupportedError(
                f"sere: layer {layer} dispatches its rows in another way than layers before it; "
                "this model cannot be re-routed over several ranks: remove the 'sere' key"
            )
        self.way = way
        return way

    def reroute_before_dispatch(
        self,
        bound: BoundPolicy,
        own: DeviceLayer,
        topk_ids: Tensor,
        topk_weights: Tensor,
        logits: Tensor | None,
        owner: Tensor | None,
    ) -> None:
        """Re-route this rank's rows by what all ranks name; a collective call.

        Args:
            bound: the running policy.
            own: what launches over this rank's rows read and write.
            topk_ids: ``[T, K]``, changed in place.
            topk_weights: ``[T, K]``, changed in place by rules that read scores.
            logits: ``[T, E]``; None in layers that stay exact, and where no rule reads them.
            owner: of ``owners``; None under a load balancer.
        """
        of_layer = self.rule.kernel(topk_ids.dtype), topk_ids, topk_weights, own
        if RULES[bound.rule].needs_scores and logits is not None:
            across_ranks.ask_of_ranks(*of_layer, logits, self.asked)
            self.group.add_up(self.asked)
            across_ranks.reroute_by_asked(*of_layer, logits, self.asked, owner, self.read)
        elif self.peers:
            across_ranks.reroute_with_peers(*of_layer, self.peers, self.read)
        else:
            across_ranks.lowest_slot_orders(*of_layer, self.slot_orders)
            self.group.exchange(self.slot_orders)
            across_ranks.reroute_by_slot_orders(*of_layer, self.slot_orders, self.read)

    @cached_property
    def peers(self) -> Peers | None:
        """Connected in the first pass, which no graph captures."""
        peers = self.group.connect()
        how = "inside the kernel" if peers else "by an all-reduce in each layer"
        logger.info("sere-ray: %d ranks exchange their union %s", self.group.num_ranks, how)
        return peers

    # --- a layer, when the ids of all ranks are gathered ------------------------------------------

    def expect_ids(self, layer: int, placement: Placement, *, sorts: bool) -> None:
        """The ids of a layer are gathered next.

        Args:
            layer: decoder layer index.
            placement: where its experts are.
            sorts: whether they may be given the ids sorted.
        """
        self.placements[layer] = placement
        self._expected = layer, sorts

    @property
    def expects_ids(self) -> bool:
        """Whether the ids of a layer are gathered next."""
        return self._expected is not None

    def check_nothing_expected(self) -> None:
        """What was to be gathered must have been.

        Raises:
            UnsupportedError: this vLLM gathers elsewhere.
        """
        if self._expected is not None:
            raise UnsupportedError(
                f"sere: the ids of layer {self._expected[0]} were not gathered where this version "
                "expects it; report this with the model's name and --all2all-backend"
            )

    def take_gathered(self, topk_ids: Tensor, topk_weights: Tensor) -> Gathered:
        """The ids that were expected, ``[T, K]``, with their weights."""
        assert self._expected is not None
        (layer, sorts), self._expected = self._expected, None
        return Gathered(layer, topk_ids, topk_weights, sorts)

    def reroute(self, gathered: Gathered) -> None:
        """Re-route the rows of all ranks in place.

        In the ways ``before`` and ``local`` the ids are final, and only counted.
        """
        across_ranks.reroute_gathered(*self._arguments(gathered))

    def align(self, gathered: Gathered, block_size: int, skips_foreign: bool) -> Aligned | None:
        """Re-route the rows of all ranks in place, and sort the slots of this rank's experts.

        Args:
            gathered: of the layer.
            block_size: rows of the expert GEMM's tile.
            skips_foreign: whether the experts leave out slots of other ranks' experts.

        Returns:
            None where the experts want blocks of other ranks' experts, too: then vLLM sorts.
        """
        if not skips_foreign:
            self.reroute(gathered)
            return None
        return across_ranks.reroute_gathered_and_align(
            *self._arguments(gathered), block_size=block_size
        )

    def _arguments(self, gathered: Gathered) -> tuple[Any, ...]:
        layer, rule = gathered.layer, self.rule
        of_layer = rule.of_layer(layer, self.step_input, self.counters)
        if self.way != "gathered":  # ids are final
            of_layer = of_layer._replace(settings=rule.identity.buffer[0])
        kernel = rule.kernel(gathered.topk_ids.dtype)
        ids, weights = gathered.topk_ids, gathered.topk_weights
        return kernel, ids, weights, of_layer, self.placements[layer]

    # --- counters ---------------------------------------------------------------------------------

    def read_counters(self) -> NDArray[np.int64]:
        """``[2, layers, NUM_COUNTERS]``, zero where vLLM gathers no ids; waits for the device."""
        counters: NDArray[np.int64] = self.counters.to("cpu", copy=True).numpy()
        return counters[:, self.rule.rows]

    def report(self) -> dict[str, Any]:
        """Where ids are gathered, what the experts of all ranks were asked for.

        Returns:
            For either kind of step: ``steps``, and per layer, summed over steps, ``experts_before``
            and ``experts_read`` (distinct, over all ranks), ``busiest_before`` and ``busiest_read``
            (of the rank that reads the most in that layer and step).
        """
        found, report = self.read_counters(), {}
        for kind, name in enumerate(KIND_NAMES):
            before, read, _, _, _, _, busiest_before, busiest_read = found[kind].T.tolist()
            report[name] = {
                "steps": self.steps[kind],
                "experts_before": before,
                "experts_read": read,
                "busiest_before": busiest_before,
                "busiest_read": busiest_read,
            }
        return report

    def reset_counters(self) -> None:
        """Count from zero again, behind every step launched so far."""
        self.counters.zero_()
        self.steps = [0, 0]
