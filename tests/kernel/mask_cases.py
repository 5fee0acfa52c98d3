"""What kernels with learned masks must return: the integers of ``masks/compose.py``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from sere_ray.kernel.launcher import RuleKernel
from sere_ray.kernel.memory import (
    FIRST_KEPT,
    MASKED,
    MASKED_COUNTERS,
    DeviceLayer,
    LayerTables,
    Settings,
    StepInput,
)
from sere_ray.masks.compose import MaskedRows, after_masks, rows_for_sere
from sere_ray.masks.slots import drop, kept_by
from sere_ray.policy.bound import BoundPolicy
from sere_ray.rules import PADDING, REROUTABLE, Choice, Layer, name_dropped, sere
from sere_ray.rules.common import named_by
from sere_ray.rules.demand import DEMAND_RULES
from tests.rules.test_sere import assert_same_ids

from .margin_cases import KNOBS, Found, MarginCase, Math, make_margin_case, scores_of
from .spare_cases import KINDS_OF_LOSS, make_statistics

LEFT = {"all": 9.0, "most": 1.0, "some": 0.0, "few": -1.5, "nothing": -9.0}
"""Mean of the mask routers' numbers, whose standard deviation is 1."""
OF_RULE: dict[str, dict[str, list[Any]]] = {
    "none": {},
    "sere": {"select_top_k": [1, 2, 3], "threshold": [None, 0.3, 0.7]},
    "margin": KNOBS,
    "spare": {"tau": KNOBS["tau"], "lead": [0.0, 0.5], "limit": [0.0, 1.0], "protect": [False]},
}
"""What is drawn for a rule."""


class MaskCase(NamedTuple):
    """A batch of one layer with what its mask router says."""

    batch: MarginCase
    mask_logits: Tensor
    """``[T, E]``, of the gate's type."""
    keep_first: bool
    similarity: Tensor
    select_top_k: int
    threshold: float | None

    @property
    def rule(self) -> str:
        return self.batch.rule

    @property
    def experts(self) -> int:
        return self.batch.logits.shape[1]

    @property
    def kept(self) -> Tensor:
        """``[T, K]`` bool, by the specification."""
        ids, batch = self.batch.ids, self.batch
        of_slots = self.mask_logits.float().gather(1, ids.clamp(min=0).long())
        return kept_by(
            of_slots,
            ids,
            batch.weights,
            batch.kinds,
            num_experts=self.experts,
            keep_first=self.keep_first,
        )

    @property
    def layer(self) -> Layer:
        return Layer(
            self.experts,
            similarity=self.similarity,
            statistics=self.batch.statistics,
            select_top_k=self.select_top_k,
            threshold=self.threshold,
            min_primary_experts=self.batch.floor,
            **self.batch.knobs,
        )

    def policy(self, mode: str) -> BoundPolicy:
        return BoundPolicy(
            mode=mode,
            rule=self.rule,
            select_top_k=self.select_top_k,
            threshold=self.threshold,
            min_primary_experts=self.batch.floor,
            level=1,
            knobs=tuple(self.batch.knobs.items()),
        )

    def kernel(self) -> RuleKernel:
        ids, logits = self.batch.ids, self.batch.logits
        shape = self.experts, ids.shape[1]
        return RuleKernel(*shape, ids.dtype, logit_dtype=logits.dtype, masks=True)

    def device_layer(
        self, device: torch.device, mode: str, *, merges: bool, masks: bool
    ) -> DeviceLayer:
        """The second of two layers; ``masks``: whether its level is not 0."""
        batch = self.batch
        settings = Settings(device, layers=2, merges=merges)
        settings.write(
            self.policy(mode),
            top_k=batch.ids.shape[1],
            num_experts=self.experts,
            statistics=[batch.statistics] * 2,
            masks=[FIRST_KEPT if self.keep_first else MASKED] * 2 if masks else (),
        )
        step = StepInput(max(len(batch.ids), 1), device)
        drafts = None if batch.row_weight is None else batch.row_weight.numpy()
        step.write(batch.kinds.numpy(), counter_row=1, weights=drafts)
        counters = torch.zeros((2, MASKED_COUNTERS), dtype=torch.int64, device=device)
        tables = LayerTables.build(self.similarity, device, batch.statistics)
        return DeviceLayer(tables, settings.buffer[1], step, counters)


def expected(case: MaskCase, math: Math, *, merges: bool) -> Found:
    """Ids, weights, counters, of CPU tensors.

    Args:
        case: the batch.
        math: of the device.
        merges: whether dropped slots are id -1; else they name what the row's first slot names
            that is left, in an empty row the lowest expert that is read, or 0.
    """
    batch, kept = case.batch, case.kept
    (ids, weights), critical, beyond = _ruled(case, kept, math, merges=merges)
    rows = batch.kinds != PADDING
    had = (batch.ids[:, :, None] == ids[:, None, :]).any(dim=2)
    if case.rule == "sere":
        had = batch.ids == ids
    read = named_by(ids, rows, case.experts)
    merged = int((kept & (ids < 0) & (batch.ids >= 0)).sum()) if merges else 0
    lost = kept & ~had & rows[:, None]
    if case.rule == "sere" and merges:
        lost = kept & (_unmerged(case, kept) != batch.ids) & rows[:, None]
    if not merges:
        ids = name_dropped(ids, batch.ids)
        empty = (ids < 0) & (batch.ids >= 0)
        ids = torch.where(empty, int(read.nonzero()[0]) if read.any() else 0, ids)
    counts = (
        int(named_by(batch.ids, rows, case.experts).sum()),
        int(named_by(ids, rows, case.experts).sum()),
        int(lost.sum()),
        critical,
        merged,
        beyond,
        int((~kept).sum()),
    )
    if REROUTABLE not in batch.kinds:
        counts = (0,) * MASKED_COUNTERS  # steps without a decode row are not counted
    return ids.to(batch.ids.dtype), weights, counts


def _ruled(case: MaskCase, kept: Tensor, math: Math, *, merges: bool) -> tuple[Choice, int, int]:
    """Ids of -1 wherever a slot is dropped; critical experts; steps beyond calibration."""
    batch, layer = case.batch, case.layer
    scores = scores_of(batch.logits, batch.gate, math)
    rows = batch.ids, batch.weights, scores, batch.kinds
    if case.rule not in DEMAND_RULES:
        choice = after_masks(case.rule, kept, *rows, layer)
        if case.rule == "none":
            return choice, 0, 0
        if not merges:
            choice = drop(kept, _unmerged(case, kept), batch.weights)
        return choice, _critical(case, kept), 0
    rule = DEMAND_RULES[case.rule]
    layer = rule.settle(layer)
    left = MaskedRows.of(kept, *rows)
    asked = left.ask(rule, layer, batch.row_weight)
    choice = left.take(rule, rule.keep(asked, layer), layer)
    if batch.row_weight is None:
        again = after_masks(case.rule, kept, *rows, case.layer)
        assert all(torch.equal(*pair) for pair in zip(choice, again, strict=True))
    beyond = layer.most is not None and bool(rule.given_up(asked, layer) > layer.most)
    return choice, 0, int(beyond)


def _of_sere(case: MaskCase, kept: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    named, weights, kinds = rows_for_sere(
        kept, case.batch.ids, case.batch.weights, case.batch.kinds
    )
    return (named, weights, case.similarity), {
        "row_kind": kinds,
        "select_top_k": case.select_top_k,
        "threshold": case.threshold,
        "min_primary_experts": case.batch.floor,
    }


def _unmerged(case: MaskCase, kept: Tensor) -> Tensor:
    given, numbers = _of_sere(case, kept)
    return sere.reroute(*given, **numbers)


def _critical(case: MaskCase, kept: Tensor) -> int:
    if not 0 < case.select_top_k < kept.shape[1]:
        return 0
    given, numbers = _of_sere(case, kept)
    found = sere.find_rerouting(*given, **numbers)
    new_ids, kinds = sere.reroute(*given, **numbers), numbers["row_kind"]
    read = named_by(new_ids, kinds != PADDING, case.experts)
    return int((read & ~found.primary).sum())


def make_mask_case(
    *, rule: str, left: str, keep_first: bool, seed: int, experts: int, slots: int, **given: Any
) -> MaskCase:
    """As :func:`make_margin_case`, of a rule, with mask routers that leave so much of rows.

    Args:
        rule: of ``OF_RULE``.
        left: of ``LEFT``.
        keep_first: whether rows keep their first choices.
        seed: of everything random.
        experts: E.
        slots: K.
        **given: of :func:`make_margin_case`, and the rule's knobs.
    """
    own = {name: given.pop(name, None) for name in ("select_top_k", "threshold")}
    batch = make_margin_case(seed=seed, experts=experts, slots=slots, **given)
    batch = batch._replace(rule=rule)
    if rule == "spare":
        statistics = make_statistics(experts, KINDS_OF_LOSS[seed % len(KINDS_OF_LOSS)], seed)
        batch = batch._replace(statistics=statistics)
    g = torch.Generator().manual_seed(seed + 1)
    mask_logits = torch.randn(batch.logits.shape, generator=g) + LEFT[left]
    if left != "nothing":
        mask_logits[torch.rand(mask_logits.shape, generator=g) < 0.05] = 0.0  # leaves a slot
    similarity = torch.rand((experts, experts), generator=g)
    similarity = (8 * similarity).round() / 8 if seed % 2 else similarity
    select_top_k = slots if rule != "sere" else min(own["select_top_k"] or 1, slots)
    return MaskCase(
        batch,
        mask_logits.to(batch.logits.dtype),
        keep_first,
        similarity.fill_diagonal_(1.0),
        select_top_k,
        own["threshold"],
    )


@st.composite
def mask_cases(draw: Callable[..., Any], rule: str, **fixed: Any) -> MaskCase:
    """Random ones of a rule and shape."""
    knobs = {name: draw(st.sampled_from(values)) for name, values in OF_RULE[rule].items()}
    slots = fixed["slots"]
    choices = {
        "seed": st.integers(0, 10**6),
        "rows": st.integers(0, 24),
        "dtype": st.sampled_from([torch.bfloat16, torch.float32]),
        "id_dtype": st.sampled_from([torch.int32, torch.int64]),
        "kinds": st.sampled_from(["mixed", "mixed", "decode", "exact", "padding"]),
        "floor": st.sampled_from([0, slots, 40]),
        "left": st.sampled_from(sorted(LEFT)),
        "keep_first": st.booleans(),
    }
    drawn = {name: draw(choice) for name, choice in choices.items() if name not in fixed}
    return make_mask_case(rule=rule, **drawn, **fixed, **knobs)


def check_masked(found: Found, wanted: Found, case: MaskCase) -> None:
    """Ids and counters ``==``; weights too, but for rows that a rule of demand changed."""
    ids, weights, counts = found
    assert_same_ids(ids, wanted[0], f"{case.rule} after masks")
    assert counts == wanted[2]
    if case.rule in ("none", "sere"):
        assert torch.equal(weights, wanted[1])
    torch.testing.assert_close(weights, wanted[1], rtol=1e-5, atol=1e-9)
