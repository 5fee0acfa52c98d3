"""The torch reference against the brute-force oracle, and properties of the rule."""

import doctest
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sere_ray.rules import EXACT, PADDING, REROUTABLE, RuleCounts, count, sere
from sere_ray.rules.sere import apply_rerouting, find_rerouting

from . import oracle

settings.register_profile(
    "rules",
    deadline=None,
    max_examples=40,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
RULES = settings.get_profile("rules")

WEIGHT_LEVELS = torch.tensor([-0.5, -0.0, 0.0, 0.125, 0.25, 1.0])
SIMILARITY_LEVELS = torch.tensor([-0.5, -0.0, 0.0, 0.1, 0.3, 0.5, 0.7, 1.0])


# --- cases -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Arguments of one call. Its repr is the recipe, not the numbers."""

    recipe: dict[str, Any]
    ids: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    similarity: Tensor = field(repr=False)
    row_kind: Tensor | None = field(repr=False)
    select_top_k: int
    threshold: float | None
    floor: int

    @property
    def slots(self) -> int:
        return self.ids.shape[-1]

    @property
    def experts(self) -> int:
        return self.similarity.shape[0]

    @property
    def kinds(self) -> Tensor:
        if self.row_kind is None:
            return torch.full((self.ids.shape[0],), REROUTABLE, dtype=torch.int8)
        return self.row_kind

    @property
    def valid(self) -> Tensor:
        return (self.ids >= 0) & (self.ids < self.experts)

    @property
    def is_identity(self) -> bool:
        return not 0 < self.select_top_k < self.slots

    @property
    def tensors(self) -> list[Tensor]:
        some = [self.ids, self.weights, self.similarity, self.row_kind]
        return [t for t in some if t is not None]

    def rule_arguments(self) -> dict[str, Any]:
        return {
            "row_kind": self.row_kind,
            "select_top_k": self.select_top_k,
            "threshold": self.threshold,
            "min_primary_experts": self.floor,
        }

    def reroute(self) -> Tensor:
        return sere.reroute(self.ids, self.weights, self.similarity, **self.rule_arguments())

    def rerouting(self) -> sere.Rerouting:
        return find_rerouting(self.ids, self.weights, self.similarity, **self.rule_arguments())

    def oracle(self) -> oracle.Outcome:
        return oracle.reroute(
            self.ids.tolist(),
            self.weights.tolist(),
            self.similarity.tolist(),
            num_slots=self.slots,
            row_kind=None if self.row_kind is None else self.row_kind.tolist(),
            select_top_k=self.select_top_k,
            threshold=self.threshold,
            min_primary_experts=self.floor,
        )


def make_case(
    *,
    seed: int,
    rows: int,
    experts: int,
    slots: int,
    select_top_k: int,
    floor: int = 0,
    threshold: str = "none",
    kinds: str = "mixed",
    gate: bool = False,
    tied: bool = True,
    id_dtype: torch.dtype = torch.int64,
    weight_dtype: torch.dtype = torch.float32,
    strided: bool = False,
) -> Case:
    """Fill a case from a seeded generator.

    ``gate``: what a gate returns: distinct valid ids, weights descending. Else anything goes:
    unsorted weights, duplicates within a row, sentinels.
    """
    recipe = dict(locals())
    g = torch.Generator().manual_seed(seed)

    def randint(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g)

    if tied:
        weights = WEIGHT_LEVELS[randint(0, len(WEIGHT_LEVELS), rows, slots)].double()
        weights += 1e-12 * randint(0, 2, rows, slots)  # ties in every dtype but float64
        below_zero = 0.75 * int(randint(0, 2, 1))  # threshold 0 is not no threshold
        similarity = SIMILARITY_LEVELS[randint(0, len(SIMILARITY_LEVELS), experts, experts)]
        similarity -= below_zero
    else:
        weights = rand(rows, slots).double()
        similarity = torch.randn((experts, experts), generator=g)
    if gate:
        weights = weights.sort(dim=1, descending=True).values
        ids = rand(rows, experts).topk(slots, dim=1).indices if rows else randint(0, 1, 0, slots)
    else:
        hot = int(randint(1, experts + 1, 1))  # few experts in use: many duplicates
        ids = torch.randperm(experts, generator=g)[randint(0, hot, rows, slots)]
        far = torch.iinfo(id_dtype)
        sentinels = torch.tensor([-1, experts, experts + 7, far.min, far.max])
        is_sentinel = rand(rows, slots) < 0.15
        ids = torch.where(is_sentinel, sentinels[randint(0, 5, rows, slots)], ids)

    row_kind = {
        "none": None,
        "padding": torch.full((rows,), PADDING),
        "re-routable": torch.full((rows,), REROUTABLE),
        "exact": torch.full((rows,), EXACT),
        "decode": randint(0, 2, rows),
        "mixed": randint(0, 3, rows),
        "few exact": torch.where(rand(rows) < 0.05, EXACT, randint(0, 2, rows)),
    }[kinds]

    entry = float(similarity[int(randint(0, experts, 1)), int(randint(0, experts, 1))])
    rho = {
        "none": None,
        "zero": 0.0,
        "decimal": 0.1 * int(randint(0, 11, 1)),  # its float32 is another number
        "entry": entry,
        "entry from above": entry + 1e-12,  # rounds to the entry itself, or to nearly 0
        "entry from below": entry - 1e-12,
        "above entry": float(np.nextafter(np.float32(entry), np.float32(np.inf))),
        "huge": 1e300,
        "hugely negative": -1e300,
    }[threshold]

    def lay_out(tensor: Tensor | None) -> Tensor | None:
        """The same values at other strides, strange ones in between."""
        if tensor is None or not strided:
            return tensor
        step = int(randint(1, 4, 1))
        if tensor.dim() == 2 and randint(0, 2, 1):
            tensor = tensor.t().contiguous().t()
            return tensor
        shape = (*tensor.shape[:-1], tensor.shape[-1] * step + 1)
        base = torch.ones(shape, dtype=tensor.dtype)
        view = base[..., 1::step][..., : tensor.shape[-1]]
        return view.copy_(tensor)

    return Case(
        recipe,
        lay_out(ids.to(id_dtype)),
        lay_out(weights.to(weight_dtype)),
        lay_out(similarity),
        lay_out(None if row_kind is None else row_kind.to(torch.int8)),
        select_top_k,
        rho,
        floor,
    )


THRESHOLDS = ("none", "zero", "decimal", "entry", "entry from above", "entry from below")
THRESHOLDS += ("above entry", "huge", "hugely negative")
KINDS = ("none", "none", "padding", "re-routable", "re-routable", "exact")
KINDS += ("decode", "decode", "decode", "mixed", "mixed", "few exact", "few exact")


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Any call at all; ``fixed`` pins an argument of make_case, or gives its strategy."""

    def pick(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        if name not in fixed:
            return draw(strategy)
        value = fixed[name]
        return draw(value) if isinstance(value, st.SearchStrategy) else value

    gate = pick("gate", st.sampled_from([False, False, True]))
    experts = pick(
        "experts", st.integers(2, 20) | st.sampled_from([60, 64, 128, 512]) | st.integers(1, 512)
    )
    slots = pick("slots", st.integers(2, 8) | st.sampled_from([4, 6, 8, 10]) | st.integers(1, 16))
    if gate:
        slots = min(slots, experts)
    small_first = [s for s in range(1, slots) for _ in range(slots - s)]
    any_s = small_first * max(1, 16 // max(1, len(small_first))) + [-1, 0, slots, slots + 1]
    return make_case(
        seed=draw(st.integers(0, 2**32 - 1)),
        rows=pick("rows", st.integers(1, 8) | st.integers(3, 40) | st.integers(0, 600)),
        experts=experts,
        slots=slots,
        select_top_k=pick("select_top_k", st.sampled_from(any_s)),
        floor=pick("floor", st.sampled_from([0, slots]) | st.integers(0, experts + 1)),
        threshold=pick("threshold", st.sampled_from(THRESHOLDS)),
        kinds=pick("kinds", st.sampled_from(KINDS)),
        gate=gate,
        tied=pick("tied", st.booleans()),
        id_dtype=pick("id_dtype", st.sampled_from([torch.int32, torch.int64])),
        weight_dtype=draw(
            st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])
            | st.just(torch.float64)
        ),
        strided=draw(st.booleans()),
    )


def assert_same_ids(actual: Tensor, expected: Tensor | list[list[int]], what: str) -> None:
    """Equal with ==, or the first slot that differs."""
    if isinstance(expected, list):
        expected = torch.tensor(expected, dtype=torch.int64).reshape(actual.shape)
    assert actual.shape == expected.shape, what
    differs = (actual.long() != expected.long()).nonzero()
    if len(differs):
        at = tuple(differs[0].tolist())
        pytest.fail(
            f"{what}: {len(differs)} of {actual.numel()} differ, first at {at}: "
            f"{int(actual[at])}, expected {int(expected[at])}"
        )


def members(mask: Tensor) -> set[int]:
    return set(mask.nonzero().flatten().tolist())


def numbers(counts: RuleCounts) -> dict[str, int]:
    return {name: int(value) for name, value in counts._asdict().items()}


# --- the oracle itself: worked by hand ---------------------------------------------------------

CHAIN = [  # row u: how well v stands in for u
    [1.0, 0.9, 0.2, 0.2],
    [0.3, 1.0, 0.3, 0.1],
    [0.5, 0.4, 1.0, 0.5],
    [-0.1, 0.2, 0.6, 1.0],
]


@pytest.mark.parametrize(
    ("ids", "weights", "arguments", "expected"),
    [
        # P = {0, 3}; 1 -> 0; 2 ties between 0 and 3 -> 0.
        pytest.param(
            [[0, 1], [3, 2]], [[2, 1], [2, 1]], {"select_top_k": 1}, [[0, 0], [3, 0]], id="tie"
        ),
        # Unsorted weights: the primaries are 1 and 2.
        pytest.param(
            [[0, 1], [3, 2]], [[1, 2], [1, 2]], {"select_top_k": 1}, [[1, 1], [2, 2]], id="order"
        ),
        # Equal weights: slot order.
        pytest.param([[3, 2]], [[1, 1]], {"select_top_k": 1}, [[3, 3]], id="equal weights"),
        # A sentinel with the largest weight is no primary.
        pytest.param([[-1, 3, 2]], [[9, 2, 1]], {"select_top_k": 1}, [[-1, 3, 3]], id="sentinel"),
        # 2 is critical: 0.5 < 0.55; 1 is too: 0.3 < 0.55.
        pytest.param(
            [[0, 1], [3, 2]],
            [[2, 1], [2, 1]],
            {"select_top_k": 1, "threshold": 0.55},
            [[0, 1], [3, 2]],
            id="critical",
        ),
        # float32(0.3) > 0.3: compared in float64, 0.3f >= 0.3; just above 0.3f it rounds to it.
        pytest.param(
            [[0, 1], [3, 1]],
            [[2, 1], [2, 1]],
            {"select_top_k": 1, "threshold": oracle.float32(0.3) + 1e-12},
            [[0, 0], [3, 0]],
            id="threshold rounds",
        ),
        # min(m, |P_K|): a batch of one token has K experts, all are kept.
        pytest.param(
            [[0, 1, 2]],
            [[3, 2, 1]],
            {"select_top_k": 1, "min_primary_experts": 3},
            [[0, 1, 2]],
            id="floor at batch 1",
        ),
        # |P_1| = 1 < 2 = |P_2|: S_eff = 2, and 3 -> 2 (0.6), 0 -> 1 (0.9).
        pytest.param(
            [[1, 2, 3], [1, 2, 0]],
            [[3, 2, 1], [3, 2, 1]],
            {"select_top_k": 1, "min_primary_experts": 2},
            [[1, 2, 2], [1, 2, 1]],
            id="floor",
        ),
        # Row 0 is exact: 1 and 2 are read anyway. Row 2 is padding: adds nothing, keeps all.
        pytest.param(
            [[1, 2], [0, 3], [3, 0]],
            [[2, 1], [2, 1], [2, 1]],
            {"select_top_k": 1, "row_kind": [EXACT, REROUTABLE, PADDING]},
            [[1, 2], [0, 2], [3, 0]],
            id="row kinds",
        ),
        # A threshold of 0 refuses what is less similar than 0; no threshold does not.
        pytest.param(
            [[0, 3]], [[2, 1]], {"select_top_k": 1, "threshold": 0.0}, [[0, 3]], id="threshold 0"
        ),
        pytest.param([[0, 3]], [[2, 1]], {"select_top_k": 1}, [[0, 0]], id="no threshold"),
        pytest.param([[0, 1]], [[2, 1]], {"select_top_k": 0}, [[0, 1]], id="S = 0"),
        pytest.param([[0, 1]], [[2, 1]], {"select_top_k": 2}, [[0, 1]], id="S = K"),
    ],
)
def test_worked_by_hand(
    ids: list[list[int]],
    weights: list[list[float]],
    arguments: dict[str, Any],
    expected: list[list[int]],
) -> None:
    outcome = oracle.reroute(ids, weights, CHAIN_32, num_slots=len(ids[0]), **arguments)
    assert outcome.ids == expected
    kinds = torch.tensor(arguments.get("row_kind", [REROUTABLE] * len(ids))).char()
    new = sere.reroute(
        torch.tensor(ids),
        torch.tensor(weights, dtype=torch.float32),
        torch.tensor(CHAIN),
        **{**arguments, "row_kind": kinds},
    )
    assert_same_ids(new, expected, "reroute")


CHAIN_32 = torch.tensor(CHAIN).tolist()


# --- equal to the oracle -----------------------------------------------------------------------


@settings(RULES, max_examples=250)
@given(case=cases())
def test_equals_oracle(case: Case) -> None:
    expected = case.oracle()
    new = case.reroute()
    assert new.dtype == case.ids.dtype
    assert_same_ids(new, expected.ids, "reroute")
    rerouting = case.rerouting()
    assert members(rerouting.primary) == expected.primary
    applied = apply_rerouting(rerouting, case.ids, case.row_kind)
    assert_same_ids(applied, expected.ids, "apply_rerouting")
    assert numbers(count(rerouting, case.ids, new, case.row_kind)) == {
        "experts_before": expected.experts_before,
        "experts_after": expected.experts_after,
        "slots_rerouted": expected.slots_rerouted,
        "critical_kept": expected.critical_kept,
    }


@settings(RULES, max_examples=80)
@given(
    case=cases(
        gate=True,
        experts=st.integers(2, 12) | st.sampled_from([16, 64, 128]),
        slots=st.integers(2, 8),
        floor=0,
        kinds=st.sampled_from(["none", "re-routable"]),
        threshold=st.sampled_from(["none", "zero", "decimal", "entry", "above entry"]),
    ),
)
def test_equals_published_rule(case: Case) -> None:
    """m = 0 and every row re-routable; their threshold 0 means None."""
    assume(case.select_top_k >= 1)
    assume(case.threshold is None or case.threshold >= 0)
    theirs = oracle.published(
        case.ids.tolist(),
        case.similarity.tolist(),
        select_top_k=case.select_top_k,
        threshold=case.threshold,
    )
    ours = replace(case, threshold=case.threshold or None).reroute()
    assert_same_ids(ours, theirs, "published rule")


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(
    ("rows", "slots", "experts", "select_top_k", "floor", "threshold", "kinds"),
    [
        (100_000, 8, 128, 2, 0, "none", "decode"),
        (100_000, 8, 512, 1, 500, "decimal", "few exact"),
        (131_072, 4, 60, 1, 0, "entry", "none"),
        (131_072, 4, 256, 3, 256, "decimal", "mixed"),
        (70_001, 16, 384, 1, 0, "none", "padding"),
    ],
)
def test_many_rows(
    rows: int,
    slots: int,
    experts: int,
    select_top_k: int,
    floor: int,
    threshold: str,
    kinds: str,
    strided: bool,
) -> None:
    """Too many rows for the oracle: the invariants, in numpy."""
    case = make_case(
        seed=rows + slots,
        rows=rows,
        slots=slots,
        experts=experts,
        select_top_k=select_top_k,
        floor=floor,
        threshold=threshold,
        kinds=kinds,
        id_dtype=torch.int32,
        strided=strided,
    )
    new_ids = case.reroute()
    old, new, weights = case.ids.numpy(), new_ids.numpy(), case.weights.numpy()
    similarity, kind, valid = case.similarity.numpy(), case.kinds.numpy(), case.valid.numpy()

    order = np.argsort(-np.where(valid, weights, -np.inf), axis=1, kind="stable")
    decode, exact = kind == REROUTABLE, kind == EXACT
    exact_experts = np.unique(old[exact][valid[exact]])

    def primary_of(s: int) -> np.ndarray:
        top = np.take_along_axis(old, order[:, :s], axis=1)[decode]
        is_valid = np.take_along_axis(valid, order[:, :s], axis=1)[decode]
        return np.union1d(top[is_valid], exact_experts)

    effective = select_top_k
    while len(primary_of(effective)) < min(floor, len(primary_of(slots))):
        effective += 1
    primary = primary_of(effective)
    assert members(case.rerouting().primary) == set(primary.tolist())

    assert np.array_equal(new[~decode], old[~decode]), "exact and padding rows are unchanged"
    assert np.array_equal(new[~valid], old[~valid]), "sentinels are unchanged"
    in_primary = np.isin(old, primary) & valid
    assert np.array_equal(new[in_primary], old[in_primary]), "members of P are unchanged"
    first = np.take_along_axis(old, order[:, :1], axis=1)
    assert np.array_equal(np.take_along_axis(new, order[:, :1], axis=1), first), "best slots stay"
    changed = new != old
    assert np.isin(new[changed], primary).all(), "every stand-in is in P"
    if len(primary):
        stand_in = primary[similarity[:, primary].argmax(axis=1)]
        best = similarity[np.arange(experts), stand_in]
        refused = np.zeros_like(best, bool)
        if case.threshold is not None:
            refused = best < np.float32(case.threshold)
        where = decode[:, None] & valid & ~in_primary
        u = old[where]
        assert np.array_equal(new[where], np.where(refused[u], u, stand_in[u])), "most similar"
    assert_same_ids(replace(case, ids=new_ids).reroute(), new_ids, "a second time")


# --- properties --------------------------------------------------------------------------------


@settings(RULES)
@given(case=cases())
def test_inputs_are_never_modified(case: Case) -> None:
    def memory(t: Tensor) -> Tensor:
        whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
        return whole.view(torch.uint8).clone()  # bytes: -0.0 is not 0.0

    before = [memory(t) for t in case.tensors]
    new = case.reroute()
    rerouting = case.rerouting()
    applied = apply_rerouting(rerouting, case.ids, case.row_kind)
    count(rerouting, case.ids, applied, case.row_kind)
    for result in (new, applied):
        result.fill_(-1)  # a result never shares memory with an input
    assert all(torch.equal(a, memory(t)) for a, t in zip(before, case.tensors, strict=True))


@settings(RULES)
@given(case=cases())
def test_shape_and_dtype_are_kept(case: Case) -> None:
    rerouting = case.rerouting()
    for new in (case.reroute(), apply_rerouting(rerouting, case.ids, case.row_kind)):
        assert new.shape == case.ids.shape
        assert new.dtype == case.ids.dtype
    assert (
        rerouting.named.shape
        == rerouting.primary.shape
        == rerouting.target.shape
        == (case.experts,)
    )
    assert rerouting.named.dtype == rerouting.primary.dtype == torch.bool
    assert rerouting.target.dtype == torch.int64
    counts = count(rerouting, case.ids, case.reroute(), case.row_kind)
    assert all(c.dim() == 0 and c.dtype == torch.int64 for c in counts)


@settings(RULES)
@given(case=cases(), beyond=st.integers(0, 3), low=st.booleans())
def test_no_secondary_or_no_primary_slot_is_the_identity(
    case: Case, beyond: int, low: bool
) -> None:
    case = replace(case, select_top_k=-beyond if low else case.slots + beyond)
    for new in (case.reroute(), apply_rerouting(case.rerouting(), case.ids, case.row_kind)):
        assert torch.equal(new, case.ids)


@settings(RULES)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_rows_may_come_in_any_order(case: Case, seed: int) -> None:
    order = torch.randperm(case.ids.shape[0], generator=torch.Generator().manual_seed(seed))
    shuffled = replace(
        case,
        ids=case.ids[order],
        weights=case.weights[order],
        row_kind=None if case.row_kind is None else case.row_kind[order],
    )
    assert_same_ids(shuffled.reroute(), case.reroute()[order], "rows in another order")


@settings(RULES)
@given(case=cases(kinds=st.sampled_from(KINDS[2:])), seed=st.integers(0, 2**32 - 1))
def test_padding_never_matters(case: Case, seed: int) -> None:
    """Other ids and weights in padding rows change nothing outside of these rows."""
    padding = case.kinds == PADDING
    source = make_case(**{**case.recipe, "seed": seed, "gate": False})
    changed = replace(
        case,
        ids=torch.where(padding[:, None], source.ids, case.ids),
        weights=torch.where(padding[:, None], source.weights, case.weights),
    )
    rerouting, changed_rerouting = case.rerouting(), changed.rerouting()
    for a, b in zip(rerouting, changed_rerouting, strict=True):
        assert torch.equal(a, b)
    new, changed_new = case.reroute(), changed.reroute()
    assert_same_ids(changed_new[~padding], new[~padding], "rows that are not padding")
    counts = numbers(count(rerouting, case.ids, new, case.row_kind))
    changed_counts = numbers(count(changed_rerouting, changed.ids, changed_new, changed.row_kind))
    assert counts == changed_counts


@settings(RULES)
@given(case=cases(rows=1, kinds=st.sampled_from(["none", "re-routable"])))
def test_floor_of_k_leaves_batch_1_unchanged(case: Case) -> None:
    case = replace(case, floor=case.slots)
    assert torch.equal(case.reroute(), case.ids)


@settings(RULES)
@given(case=cases(), more=st.integers(0, 20))
def test_raising_the_floor_never_shrinks_p(case: Case, more: int) -> None:
    small = members(case.rerouting().primary)
    assert small <= members(replace(case, floor=case.floor + more).rerouting().primary)
    if not case.is_identity:
        wanted = min(case.floor, len(members(replace(case, select_top_k=0).rerouting().primary)))
        assert len(small) >= wanted


@settings(RULES)
@given(case=cases())
def test_raising_s_never_shrinks_p(case: Case) -> None:
    assume(case.select_top_k >= 1)
    more = replace(case, select_top_k=case.select_top_k + 1)
    assert members(case.rerouting().primary) <= members(more.rerouting().primary)


@settings(RULES)
@given(case=cases())
def test_what_stays(case: Case) -> None:
    """Exact rows (whose experts are all in P), padding, sentinels, and the top S slots by order."""
    rerouting, new = case.rerouting(), case.reroute()
    exact = (case.kinds == EXACT)[:, None] & case.valid
    assert set(case.ids[exact].tolist()) <= members(rerouting.primary)
    stays = ~case.valid | (case.kinds != REROUTABLE)[:, None]
    weights, ids = case.weights.tolist(), case.ids.tolist()
    for row, (row_ids, row_weights) in enumerate(zip(ids, weights, strict=True)):
        ranked = oracle.ranked_slots(row_ids, row_weights, case.experts)
        stays[row, ranked[: max(case.select_top_k, 0)]] = True
    assert_same_ids(new[stays], case.ids[stays], "slots that stay")
    changed = new != case.ids
    assert set(new[changed].tolist()) <= members(rerouting.primary)


@settings(RULES)
@given(case=cases())
def test_a_second_time_changes_nothing(case: Case) -> None:
    new = case.reroute()
    assert_same_ids(replace(case, ids=new).reroute(), new, "a second time")


@settings(RULES)
@given(case=cases(), scale=st.sampled_from([2.0, 0.25]))
def test_only_the_order_of_weights_matters(case: Case, scale: float) -> None:
    assume(case.weights.dtype != torch.float16)  # might underflow into ties
    assert torch.equal(case.reroute(), replace(case, weights=case.weights * scale).reroute())


@settings(RULES)
@given(case=cases(floor=0, threshold="none"))
def test_without_floor_and_threshold_exactly_p_is_read(case: Case) -> None:
    rerouting = case.rerouting()
    counts = numbers(count(rerouting, case.ids, case.reroute(), case.row_kind))
    assert counts["critical_kept"] == 0
    assert counts["experts_after"] == len(members(rerouting.primary)) <= counts["experts_before"]


@settings(RULES, max_examples=80)
@given(case=cases(rows=st.integers(0, 12)), steps=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_leading_dimensions_are_steps_of_their_own(case: Case, steps: int, seed: int) -> None:
    """Each with other rows: what it gets alone is what it gets among others."""
    of_steps = [case]
    for step in range(1, steps):
        other = make_case(**{**case.recipe, "seed": (seed + step) % 2**32})
        of_steps.append(replace(other, similarity=case.similarity, threshold=case.threshold))
    stacked = {
        name: torch.stack([getattr(step, name) for step in of_steps])[None]
        for name in ("ids", "weights", "kinds")
    }
    together = replace(
        case, ids=stacked["ids"], weights=stacked["weights"], row_kind=stacked["kinds"]
    )
    found, rerouting = together.reroute(), together.rerouting()
    assert found.dtype == case.ids.dtype
    for number, step in enumerate(of_steps):
        assert_same_ids(found[0, number], step.reroute(), f"step {number} of {steps}")
        for of_all, alone in zip(rerouting, step.rerouting(), strict=True):
            assert torch.equal(of_all[0, number], alone)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_ids() -> None:
    case = make_case(seed=5, rows=64, experts=64, slots=8, select_top_k=2, gate=True)
    case = replace(case, threshold=0.3, floor=8)
    on_gpu = replace(
        case,
        ids=case.ids.cuda(),
        weights=case.weights.cuda(),
        similarity=case.similarity.cuda(),
        row_kind=case.kinds.cuda(),
    )
    assert torch.equal(on_gpu.reroute().cpu(), case.reroute())


# --- odd inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["expanded weights", "expanded ids", "expanded similarity"])
def test_stride_zero(view: str) -> None:
    case = make_case(
        seed=1, rows=9, experts=8, slots=4, select_top_k=1, floor=3, tied=False, kinds="decode"
    )
    if view == "expanded weights":
        case = replace(case, weights=case.weights[:1].expand(9, 4))
    elif view == "expanded ids":
        case = replace(case, ids=case.ids[:1].expand(9, 4))
    else:
        case = replace(case, similarity=case.similarity[:1].expand(8, 8))
    assert_same_ids(case.reroute(), case.oracle().ids, view)


@pytest.mark.parametrize(
    "extreme", [torch.finfo(torch.float32).min, torch.finfo(torch.float32).max]
)
def test_extreme_finite_numbers(extreme: float) -> None:
    """-inf stands for "not in P" and "not valid" inside; the least float32 is a number still."""
    case = make_case(seed=3, rows=5, experts=6, slots=3, select_top_k=1, kinds="none")
    case = replace(
        case,
        weights=torch.full_like(case.weights, extreme),
        similarity=torch.full_like(case.similarity, extreme),
    )
    assert_same_ids(case.reroute(), case.oracle().ids, "extreme")
    case = replace(case, threshold=float(extreme))
    assert_same_ids(case.reroute(), case.oracle().ids, "extreme threshold")


def test_plain_integers_as_numbers() -> None:
    case = make_case(seed=4, rows=5, experts=6, slots=3, select_top_k=1, kinds="none")
    as_int = replace(case, threshold=0).reroute()
    assert torch.equal(as_int, replace(case, threshold=0.0).reroute())


@pytest.mark.parametrize(
    "floor",
    [
        2**31,
        2**63 - 1,
        10**30,
    ],
)
def test_huge_floor(floor: int) -> None:
    case = make_case(seed=4, rows=5, experts=6, slots=3, select_top_k=1, kinds="none")
    case = replace(case, floor=floor)
    assert_same_ids(case.reroute(), case.oracle().ids, "huge floor")


def test_no_slots() -> None:
    ids = torch.zeros(2, 0, dtype=torch.int64)
    arguments = {"row_kind": None, "select_top_k": 1, "min_primary_experts": 1}
    rerouting = find_rerouting(ids, torch.zeros(2, 0), torch.eye(3), **arguments)
    assert apply_rerouting(rerouting, ids, None).shape == (2, 0)
    assert sere.reroute(ids, torch.zeros(2, 0), torch.eye(3), **arguments).shape == (2, 0)


def test_ids_without_a_dimension() -> None:
    with pytest.raises(ValueError, match=r"^topk_ids must be "):
        sere.reroute(torch.tensor(1), torch.tensor(1.0), torch.eye(3), select_top_k=1)


ROWS, SLOTS, EXPERTS = 3, 2, 5


@pytest.mark.parametrize("function", ["reroute", "find_rerouting"])
@pytest.mark.parametrize("select_top_k", [0, 1])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("topk_ids", torch.zeros(ROWS, dtype=torch.int64)),
        ("topk_ids", torch.zeros(ROWS, SLOTS)),
        ("topk_ids", torch.zeros(ROWS, SLOTS, dtype=torch.int16)),
        ("topk_ids", torch.zeros(ROWS, SLOTS, dtype=torch.uint8)),
        ("topk_ids", torch.zeros(ROWS, SLOTS, dtype=torch.bool)),
        ("topk_weights", torch.zeros(ROWS, SLOTS + 1)),
        ("topk_weights", torch.zeros(ROWS + 1, SLOTS)),
        ("topk_weights", torch.zeros(ROWS)),
        ("topk_weights", torch.zeros(1, ROWS, SLOTS)),
        ("topk_weights", torch.zeros(ROWS, 1)),
        ("topk_weights", torch.zeros(ROWS, SLOTS, dtype=torch.int64)),
        ("topk_weights", torch.zeros(ROWS, SLOTS, dtype=torch.complex64)),
        ("similarity", torch.zeros(EXPERTS, EXPERTS + 1)),
        ("similarity", torch.zeros(EXPERTS)),
        ("similarity", torch.zeros(1, EXPERTS, EXPERTS)),
        ("similarity", torch.zeros(0, 0)),
        ("similarity", torch.zeros(EXPERTS, EXPERTS, dtype=torch.float64)),
        ("similarity", torch.zeros(EXPERTS, EXPERTS, dtype=torch.bfloat16)),
        ("row_kind", torch.zeros(ROWS + 1, dtype=torch.int8)),
        ("row_kind", torch.zeros(1, dtype=torch.int8)),
        ("row_kind", torch.zeros(ROWS, 1, dtype=torch.int8)),
        ("row_kind", torch.zeros((), dtype=torch.int8)),
        ("row_kind", torch.zeros(ROWS, dtype=torch.int64)),
        ("row_kind", torch.zeros(ROWS, dtype=torch.bool)),
    ],
    ids=lambda v: f"{v.dtype}{list(v.shape)}" if isinstance(v, Tensor) else str(v),
)
def test_wrong_argument_is_named(
    function: str, select_top_k: int, argument: str, value: Tensor
) -> None:
    arguments: dict[str, Any] = {
        "topk_ids": torch.zeros(ROWS, SLOTS, dtype=torch.int64),
        "topk_weights": torch.zeros(ROWS, SLOTS),
        "similarity": torch.zeros(EXPERTS, EXPERTS),
        "row_kind": torch.ones(ROWS, dtype=torch.int8),
        "select_top_k": select_top_k,
    }
    getattr(sere, function)(**arguments)
    with pytest.raises(ValueError, match=f"^{argument} must be ") as caught:
        getattr(sere, function)(**{**arguments, argument: value})
    got = str(caught.value).split("got ")[1]
    assert str(value.dtype) in got or str(tuple(value.shape)) in got


# --- torch.compile, examples -------------------------------------------------------------------


def one_layer(
    ids: Tensor,
    weights: Tensor,
    similarity: Tensor,
    row_kind: Tensor,
) -> tuple[Tensor, Tensor, RuleCounts]:
    rerouting = find_rerouting(
        ids,
        weights,
        similarity,
        row_kind=row_kind,
        select_top_k=2,
        threshold=0.3,
        min_primary_experts=8,
    )
    new = apply_rerouting(rerouting, ids, row_kind)
    return rerouting.primary, new, count(rerouting, ids, new, row_kind)


def check_compiled(compiled: Any, *, rows: int, dynamic: bool = False) -> None:
    case = make_case(
        seed=rows,
        rows=rows,
        experts=64,
        slots=8,
        select_top_k=2,
    )
    arguments = (case.ids, case.weights, case.similarity, case.row_kind)
    primary, new, counts = one_layer(*arguments)
    if dynamic:
        for tensor in (case.ids, case.weights, case.row_kind):
            torch._dynamo.mark_dynamic(tensor, 0)
    compiled_primary, compiled_new, compiled_counts = compiled(*arguments)
    assert torch.equal(compiled_primary, primary)
    assert_same_ids(compiled_new, new, f"compiled, {rows} rows")
    assert numbers(compiled_counts) == numbers(counts)


def test_compiled_without_graph_break() -> None:
    torch._dynamo.reset()
    check_compiled(torch.compile(one_layer, fullgraph=True, dynamic=True), rows=33)


def test_one_compiled_graph_serves_any_number_of_rows() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(one_layer, fullgraph=True, backend="aot_eager")
    for rows in (33, 7, 600):
        check_compiled(compiled, rows=rows, dynamic=True)


def test_examples() -> None:
    results = doctest.testmod(sere)
    assert results.failed == 0
    assert results.attempted > 0


def test_oracle_rounds_like_torch() -> None:
    for value in (0.1, 0.3, 1 / 3, -0.7, 1e-46, 1e300, -1e300, 3.4028235677973366e38, math.pi):
        assert oracle.float32(value) == float(torch.tensor(value, dtype=torch.float32)), value
