"""One interface for every rule.

A rule is ``rule(topk_ids, topk_weights, scores, row_kind, layer) -> (topk_ids, topk_weights)``,
pure torch. Leading dimensions are steps that know nothing of each other: ``[..., T, K]``.

Rules other than ``sere`` agree on what follows. Rows that are not re-routable come out bit for bit,
and so do re-routable rows whose experts are all kept. The experts of exact rows are read anyway
and therefore always kept. A re-routable row with a sentinel among its ids counts as exact.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sere_ray.rules.gate import PLAIN, Gate

PADDING = 0
"""Row kind of a row that no request owns (CUDA-graph or data-parallel padding)."""
REROUTABLE = 1
"""Row kind of a decode row: its secondary slots may be re-routed."""
EXACT = 2
"""Row kind of a prefill row, or of a row whose request asked for exact routing."""

Choice = tuple[Tensor, Tensor]
"""``topk_ids`` and ``topk_weights``, ``[..., T, K]`` each. A dropped slot is id -1, weight 0."""


@dataclass(frozen=True)
class Layer:
    """What a rule knows of a layer beside its rows; each rule reads the knobs it has.

    Attributes:
        num_experts: E.
        similarity: ``[E, E]`` float32, for ``sere``.
        statistics: further tensors by name that some rules read: ``RuleInfo.statistics``.
        select_top_k: S of ``sere`` and ``topk``, k0 of ``oea``, k1 of ``k1k2``.
        threshold: rho of ``sere``.
        min_primary_experts: m of ``sere`` and ``margin``.
        normalise_over: of ``k1k2``, k2: the best scores of a row that share out its weight.
        experts: n of ``xshare``, ``lynx``, ``exfold`` and ``mone``, a number of kept experts.
        max_per_rank: of ``xshare``, how many of them a rank may hold; None = any number.
        owner: ``[E]`` int64, the expert-parallel rank of each expert, for ``max_per_rank`` and
            ``balance_ranks``; None = one rank holds them all.
        alpha: of ``lynx``, bins per unit of logit.
        base: of ``lynx``, what a bin's score is a power of.
        depth: of ``lynx``, the last bin.
        tau: of ``margin``, least demand of a kept expert; of ``ace``, least share of a kept slot.
        beta: of ``margin``, 1 = weights renormalised, 0 = the gate's scale.
        fill: of ``margin``, factor of the weight of a stand-in.
        runners_up: of ``margin``, how many unchosen experts a chosen one is compared with.
        balance_ranks: of ``margin``, whether tau counts what the busiest rank reads; then a first
            choice counts eight times its demand and may go.
        gate: of ``margin``, what the layer ranks experts by.
        lead: of ``spare``, what demand is made of: 1 = the lead over the runners-up, 0 = the share
            of the row's weight; None, as for the next two: what the layer's statistics suggest.
        limit: of ``spare``, most that a stand-in may leave over, 0..1.
        protect: of ``spare``, whether every row keeps its first choice.
        rcr_scale: of ``ace``, what the second view counts beside the first.
        most: of ``margin`` and ``spare``, the most demand that steps of calibration gave up, in
            units of demand; None = nobody knows.
        guard: whether a step that gives up more stays exact.
    """

    num_experts: int
    similarity: Tensor | None = None
    select_top_k: int = 0
    threshold: float | None = None
    min_primary_experts: int = 0
    experts: int = 0
    max_per_rank: int | None = None
    owner: Tensor | None = None
    alpha: float = 2.0
    base: float = 2.0
    depth: int = 8
    tau: float = 0.0
    beta: float = 0.5
    fill: float = 0.5
    runners_up: int = 8
    balance_ranks: bool = False
    gate: Gate = PLAIN
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    normalise_over: int = 0
    rcr_scale: float = 0.1
    lead: float | None = None
    limit: float | None = None
    protect: bool | None = None
    most: int | None = None
    guard: bool = False

    def statistic(self, name: str) -> Tensor:
        """A tensor that calibration, or the weights, say of this layer.

        Raises:
            ValueError: it was not given.
        """
        if name not in self.statistics:
            raise ValueError(f"this rule needs the layer's {name!r}, got {sorted(self.statistics)}")
        return self.statistics[name]


Rule = Callable[[Tensor, Tensor, Tensor | None, Tensor, Layer], Choice]
"""Arguments: ``topk_ids [..., T, K]`` int; ``topk_weights [..., T, K]`` float; ``scores
[..., T, E]`` float32, what the gate makes weights from (None where the rule needs none);
``row_kind [..., T]`` int8; the layer."""

Output = Callable[[Choice, Choice, Layer], Tensor]
"""What a rule adds to a layer's output beside its experts, ``[..., T, H]``, from the choice before
the rule and after it, and the layer."""
