"""Learned masks before the rule, in one launch, on the CPU: the integers of the specification."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_ray.kernel.memory import MASKED_COUNTERS
from sere_ray.rules import EXACT, PADDING, REROUTABLE
from tests.rules.test_sere import RULES, assert_same_ids

from .emulator import COMPILER, launch
from .kernel_cases import check_aligned, empty_alignment, library, rule_arguments
from .margin_cases import EMULATED, Found, rerouted, with_drafts
from .mask_cases import LEFT, OF_RULE, MaskCase, check_masked, expected, make_mask_case, mask_cases

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernel with")

CPU = torch.device("cpu")
SHAPES = [(128, 8), (512, 10), (33, 16)]
KERNELS = [(*shape, rule) for shape in SHAPES for rule in ("none", "sere", "margin")]
KERNELS += [(9, 3, "margin"), (128, 8, "spare")]


def make(rule: str, **given: object) -> MaskCase:
    """A batch of 20 rows of which 128 experts take 8 slots each, if nothing else is given."""
    usual = {"seed": 3, "rows": 20, "experts": 128, "slots": 8, "keep_first": False}
    own = {"tau": 0.02} if rule in ("margin", "spare") else {}
    unused = () if own else ("tau",)
    wanted = {**usual, **own, **{k: v for k, v in given.items() if k not in unused}}
    return make_mask_case(rule=rule, **wanted)


def run(
    case: MaskCase, *, mode: str = "on", merges: bool = False, masks: bool = True, **how: Any
) -> Found:
    """One launch, see :func:`rerouted`."""
    layer, batch = case.device_layer(CPU, mode, merges=merges, masks=masks), case.batch
    of_rows = batch.ids, batch.weights, batch.logits, case.mask_logits
    return rerouted(case.kernel(), layer, *of_rows, **how)


@pytest.mark.parametrize(("experts", "slots", "rule"), KERNELS)
def test_equals_the_specification(experts: int, slots: int, rule: str, cache: Path) -> None:
    ids = {} if experts == 9 else {"id_dtype": torch.int32}  # each type is a module of its own

    @settings(RULES, max_examples=12)
    @given(
        case=mask_cases(rule, experts=experts, slots=slots, **ids),
        seed=st.integers(0, 3),
        inplace=st.booleans(),
        block=st.sampled_from([None, 16]),
        cluster=st.sampled_from([1, 1, 8]),
        merges=st.booleans(),
    )
    def every(
        case: MaskCase, seed: int, inplace: bool, block: int | None, cluster: int, merges: bool
    ) -> None:
        how = {"seed": seed, "inplace": inplace, "block": block, "cluster": cluster}
        found = run(case, cache=cache, merges=merges, **how)
        check_masked(found, expected(case, EMULATED, merges=merges), case)

    every()


@pytest.mark.parametrize("rule", OF_RULE)
@pytest.mark.parametrize("merges", [False, True])
def test_rows_that_masks_leave_nothing(rule: str, merges: bool, cache: Path) -> None:
    """All rows, or all but exact ones: whatever is read then, nobody's slot has a weight."""
    for kinds, keep_first in (("decode", False), ("mixed", False), ("decode", True)):
        case = make(rule, left="nothing", keep_first=keep_first, kinds=kinds)
        ids, weights, counts = found = run(case, cache=cache, merges=merges)
        check_masked(found, expected(case, EMULATED, merges=merges), case)
        if kinds == "decode" and not keep_first:
            assert bool((weights == 0).all())
            assert bool((ids == (-1 if merges else 0)).all())
            assert counts[1] == (not merges), "some kernels read one expert at least"
        if keep_first:
            assert int(counts[6]) == ids.shape[0] * (ids.shape[1] - 1)


@pytest.mark.parametrize("rule", ["sere", "margin"])
def test_the_floor_does_not_count_masked_slots(rule: str, cache: Path) -> None:
    """A row of its own with its floor is exact but for what its mask leaves out."""
    for seed in range(5):
        case = make(rule, rows=1, seed=seed, left="some", floor=8, kinds="decode", tau=1.0)
        ids, weights, counts = run(case, cache=cache, merges=True)
        kept = case.kept
        assert torch.equal(ids, torch.where(kept, case.batch.ids, -1))
        assert torch.equal(weights, torch.where(kept, case.batch.weights, 0.0))
        assert counts == (8, int(kept.sum()), 0, 0, 0, 0, int((~kept).sum()))


@pytest.mark.parametrize("rule", ["sere", "margin"])
def test_observe_counts_and_off_does_nothing(rule: str, cache: Path) -> None:
    case = make(rule, left="some", tau=0.02)
    wanted = expected(case, EMULATED, merges=True)
    assert wanted[2][2] > 0 < wanted[2][6]
    for block, cluster in ((None, 1), (16, 8)):
        how = {"cache": cache, "block": block, "cluster": cluster, "merges": True}
        for mode in ("observe", "off"):
            ids, weights, counts = run(case, mode=mode, inplace=False, **how)
            assert_same_ids(ids, case.batch.ids, mode)
            assert torch.equal(weights, case.batch.weights)
            observed = (*wanted[2][:4], 0, *wanted[2][5:])  # what is not dropped is not counted
            assert counts == (observed if mode == "observe" else (0,) * MASKED_COUNTERS)


@pytest.mark.parametrize("rule", ["none", "sere", "margin"])
def test_level_0_is_the_rule_alone(rule: str, cache: Path) -> None:
    """Whatever masks of the last level say: the same as where they leave everything."""
    case = make(rule, left="few", tau=0.02)
    everything = case._replace(mask_logits=torch.ones_like(case.mask_logits))
    wanted = expected(everything, EMULATED, merges=True)
    assert wanted[2][6] == 0
    check_masked(run(case, cache=cache, merges=True, masks=False), wanted, everything)


@pytest.mark.parametrize("rule", ["sere", "margin"])
def test_block_sizes_as_launched(rule: str, cache: Path) -> None:
    for rows, threads, cluster in ((1, 512, 1), (70, 512, 8), (512, 1024, 8)):
        case = make(rule, rows=rows, seed=rows, left="most", floor=8, tau=0.02)
        how = {"threads": threads, "seed": 1, "block": 16, "cluster": cluster}
        found = run(case, cache=cache, merges=True, **how)
        check_masked(found, expected(case, EMULATED, merges=True), case)


def test_drafts_ask_for_less_of_what_is_left(cache: Path) -> None:
    case = make("margin", rows=64, left="most", keep_first=False, tau=0.02)
    drafted = case._replace(batch=with_drafts(case.batch))
    wanted = expected(drafted, EMULATED, merges=True)
    assert not torch.equal(wanted[0], expected(case, EMULATED, merges=True)[0])
    for block, cluster in ((None, 1), (16, 8)):
        found = run(drafted, cache=cache, merges=True, block=block, cluster=cluster)
        check_masked(found, wanted, drafted)


def route(case: MaskCase, *, cache: Path, seed: int, cluster: int, merges: bool) -> Found:
    """One launch of ``route_and_align``; padding rows are those whose ids are -1."""
    layer, batch = case.device_layer(CPU, "on", merges=merges, masks=True), case.batch
    kernel, new_ids = case.kernel(), torch.full_like(batch.ids, -7)
    weights = torch.full_like(batch.weights, -7)
    aligned, sorted_arguments = empty_alignment(kernel, new_ids, 16)
    launch(
        library(kernel, "route_and_align", 512, cache),
        "route_and_align",
        batch.logits,
        batch.ids[:, 0] < 0,
        0,
        weights,
        None,
        *rule_arguments(new_ids, new_ids, weights, layer)[1:],
        *sorted_arguments,
        case.mask_logits,
        case.mask_logits.dtype.itemsize,
        threads=512,
        cluster=cluster,
        seed=seed,
    )
    check_aligned(new_ids, aligned, 16, case.experts)
    return new_ids, weights, tuple(layer.counters[1].tolist())


@pytest.mark.parametrize("rule", ["none", "sere", "margin"])
@pytest.mark.parametrize(
    ("experts", "slots", "dtype"), [(128, 8, torch.bfloat16), (256, 6, torch.float32)]
)
def test_routes_then_leaves_out(
    experts: int, slots: int, dtype: torch.dtype, rule: str, cache: Path
) -> None:
    """The gate's top-k in the launch, too: padding, exact and re-routable rows."""
    shape = {"experts": experts, "slots": slots, "dtype": dtype, "shuffled": False, "rows": 24}
    for seed, (left, keep_first) in enumerate(itertools.product(LEFT, (False, True))):
        how = {"left": left, "keep_first": keep_first, "tau": 0.02, "floor": seed % 3 * slots}
        case = make(rule, seed=seed, kinds="decode", **shape, **how)
        logits, ids = case.batch.logits, case.batch.ids
        weights = logits.float().softmax(dim=1).gather(1, ids.long())
        kinds = torch.tensor([REROUTABLE, REROUTABLE, EXACT, PADDING], dtype=torch.int8).repeat(6)
        ids[7::8] = -1
        case = case._replace(batch=case.batch._replace(weights=weights, kinds=kinds))
        merges = seed % 2 == 0
        found = route(case, cache=cache, seed=seed, cluster=8 if seed % 3 else 1, merges=merges)
        wanted = expected(case, EMULATED, merges=merges)
        assert_same_ids(found[0], wanted[0], rule)
        assert found[2] == wanted[2]
        real = wanted[0] >= 0
        torch.testing.assert_close(found[1][real], wanted[1][real], rtol=1e-5, atol=1e-7)
        of_rows = (kinds == REROUTABLE)[:, None]
        assert bool((found[1][~real & of_rows] == 0).all())
