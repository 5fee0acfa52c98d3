"""``spare.cuh`` in its kernels, run on the CPU: the integers of the reference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sere_ray.kernel.memory import LayerTables
from sere_ray.rules.spare import spare
from tests.rules.test_sere import assert_same_ids

from .emulator import COMPILER
from .margin_cases import EMULATED, by_reference, check_margin, scores_of
from .spare_cases import GATED_SHAPES, KINDS_OF_LOSS, SHAPES, make_spare_case, spare_cases
from .test_margin_on_cpu import (
    drafts_count_less,
    gated_launches_are_the_reference,
    launches_are_the_reference,
    observes_and_switches_off,
    ranks_keep_one_set,
    route,
    run,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernel with")


@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_equals_reference(experts: int, slots: int, cache: Path) -> None:
    launches_are_the_reference(spare_cases(experts=experts, slots=slots), cache)


@pytest.mark.parametrize(("experts", "slots", "groups"), GATED_SHAPES)
def test_gates_of_every_kind(experts: int, slots: int, groups: int, cache: Path) -> None:
    shape = {"experts": experts, "slots": slots, "groups": groups}
    cases = spare_cases(**shape, id_dtype=torch.int32)
    gated_launches_are_the_reference(cases, cache, examples=20)


@pytest.mark.parametrize("losses", KINDS_OF_LOSS)
@pytest.mark.parametrize("threads", [512, 1024])
def test_block_sizes_as_launched(threads: int, losses: str, cache: Path) -> None:
    """Of every kind of stand-ins some slots move; where all of them are bad, slots are dropped."""
    seen = torch.zeros(3, dtype=torch.int64)
    for rows, tau in ((1, 0.1), (16, 0.02), (70, 0.1), (300, 0.5)):
        shape = {"rows": rows, "experts": 128, "slots": 8, "kinds": "decode"}
        case = make_spare_case(seed=rows, losses=losses, tau=tau, **shape)
        wanted = case.expected(EMULATED)
        for cluster in (1, 8):
            found = run(case, cache=cache, threads=threads, seed=1, block=16, cluster=cluster)
            check_margin(found, wanted, case)
        before, after, slots = wanted[2][:3]
        seen += torch.tensor([before - after, slots, int((wanted[1] == 0).sum())])
    assert bool((seen > 0).all())


def test_a_row_that_is_left_with_nothing_takes_its_best_scored(cache: Path) -> None:
    """No stand-in fits, and first choices are not protected."""
    knobs = {"tau": 1.0, "limit": 0.0, "protect": False, "lead": 0.0}
    case = make_spare_case(
        seed=1, rows=20, experts=60, slots=4, kinds="decode", losses="foreign", **knobs
    )
    wanted = case.expected(EMULATED)
    assert wanted[2][1] == 1
    assert int((wanted[0] != case.ids).all(dim=1).sum()) > 5
    for block, cluster in ((None, 1), (16, 8)):
        check_margin(run(case, cache=cache, block=block, cluster=cluster), wanted, case)


def test_dropped_slots_are_no_expert_where_experts_skip_them(cache: Path) -> None:
    for seed, losses in enumerate(KINDS_OF_LOSS):
        shape = {"rows": 24, "experts": 64, "slots": 6, "kinds": "decode"}
        case = make_spare_case(seed=seed, losses=losses, tau=0.05, **shape)
        scores = scores_of(case.logits, case.gate, EMULATED)
        wanted = spare(case.ids, case.weights, scores, case.kinds, case.layer)
        for cluster in (1, 8):
            ids, weights, counts = run(case, cache=cache, merges=True, cluster=cluster)
            assert_same_ids(ids, wanted[0], losses)
            torch.testing.assert_close(weights, wanted[1], rtol=1e-5, atol=1e-9)
            assert counts[4] == int((wanted[0] < 0).sum()) > 0


def test_demand_beyond_what_is_told_apart_is_not_kept_anyway(cache: Path) -> None:
    """Both experts are wanted by thousands of rows; one leaves nothing of the other over."""
    knobs = {"tau": 1.0, "lead": 0.0, "limit": 1.0, "protect": False}
    shape = {"rows": 3000, "experts": 4, "slots": 2, "kinds": "decode"}
    case = make_spare_case(seed=0, losses="chain", **shape, **knobs)
    case.logits.copy_(torch.tensor([60.0, 60.0, -60.0, -60.0]))
    case.ids.copy_(torch.tensor([0, 1]))
    case.weights.fill_(0.5)
    for cluster in (1, 8):
        found = run(case, cache=cache, threads=512, seed=2, cluster=cluster)
        check_margin(found, case.expected(EMULATED), case)
        assert found[2] == (2, 1, 3000, 0, 0, 0)


def test_of_equal_demand_the_first_expert_is_kept(cache: Path) -> None:
    """Either leaves nothing of the other over."""
    knobs = {"tau": 0.9, "lead": 0.0, "limit": 1.0, "protect": False}
    shape = {"rows": 30, "experts": 4, "slots": 2, "kinds": "decode"}
    case = make_spare_case(seed=0, **shape, **knobs)
    case.logits.copy_(torch.tensor([-60.0, 60.0, 60.0, -60.0]))
    case.ids.copy_(torch.tensor([2, 1]))
    case.weights.fill_(0.5)
    for loss, kept in ((0.0, [1]), (0.95, [1, 2])):
        case.statistics["directed_loss"].fill_(loss)
        case.statistics["directed_scale"].fill_(1.0)
        wanted = case.expected(EMULATED)
        assert wanted[0].unique().tolist() == kept
        for cluster in (1, 8):
            check_margin(run(case, cache=cache, cluster=cluster), wanted, case)


@pytest.mark.parametrize("experts", [128, 300])
def test_stand_ins_beyond_the_nearest_32(experts: int, cache: Path) -> None:
    """Every expert is most like the half that no row names."""
    knobs = {"tau": 0.05, "lead": 0.0, "limit": 1.0, "protect": False}
    case = make_spare_case(seed=4, rows=40, experts=experts, slots=8, kinds="decode", **knobs)
    case.logits[:, experts // 2 :] = -40.0
    top = case.logits.float().softmax(dim=1).topk(8)
    case.ids.copy_(top.indices)
    case.weights.copy_(top.values)
    near = torch.arange(experts) >= experts // 2
    loss = case.statistics["directed_loss"]
    loss.copy_(torch.where(near, loss / 100, 0.1 + loss / 10))
    wanted = case.expected(EMULATED)
    useless = {**case.statistics, "directed_loss": torch.ones_like(loss)}
    alone = replace(case.layer, statistics=useless)
    rows = case.ids, case.weights, case.logits, case.kinds
    without = by_reference(*rows, alone, EMULATED, rule="spare")
    assert 1 < wanted[2][1] < without[2][1], "stand-ins are what others are spared for"
    for block, cluster in ((None, 1), (16, 8)):
        check_margin(run(case, cache=cache, block=block, cluster=cluster), wanted, case)


def test_observe_counts_and_off_does_nothing(cache: Path) -> None:
    case = make_spare_case(seed=3, rows=20, experts=60, slots=4, tau=0.02)
    observes_and_switches_off(case, ((None, 1), (16, 8)), cache)


@pytest.mark.parametrize(
    ("experts", "slots", "groups"), [(128, 8, None), (60, 4, None), (300, 5, None), (64, 6, 4)]
)
def test_two_ranks_keep_one_set(experts: int, slots: int, groups: int | None, cache: Path) -> None:
    gated = {} if groups is None else {"groups": groups}
    cases = spare_cases(experts=experts, slots=slots, id_dtype=torch.int32, **gated)
    ranks_keep_one_set(cases, cache)


@pytest.mark.parametrize(
    ("experts", "slots", "dtype"), [(128, 8, torch.bfloat16), (64, 6, torch.float32)]
)
def test_routes_then_follows_the_rule(experts, slots, dtype, cache) -> None:
    shape = {"experts": experts, "slots": slots, "dtype": dtype, "shuffled": False}
    for seed, losses in enumerate(KINDS_OF_LOSS):
        case = make_spare_case(seed=seed, rows=24, kinds="decode", losses=losses, tau=0.05, **shape)
        case = case._replace(weights=case.logits.float().softmax(dim=1).gather(1, case.ids.long()))
        wanted = case.expected(EMULATED)
        for cluster in (1, 8):
            ids, weights, counts = route(case, cache=cache, seed=seed, block=16, cluster=cluster)
            assert_same_ids(ids, wanted[0], losses)
            assert counts == wanted[2]
            torch.testing.assert_close(weights, wanted[1], rtol=1e-5, atol=1e-9)


def test_demand_of_drafts_counts_less(cache: Path) -> None:
    shape = {"rows": 64, "experts": 128, "slots": 8, "lead": 0.5}
    taus = enumerate((0.0005, 0.004, 0.02, 0.1))
    drafts_count_less((make_spare_case(seed=seed, tau=tau, **shape) for seed, tau in taus), cache)


def test_tables_hold_what_calibration_measured() -> None:
    case = make_spare_case(seed=0, rows=1, experts=33, slots=4, losses="tied", tau=0.1)
    tables = LayerTables.build(torch.eye(33), torch.device("cpu"), case.statistics)
    assert tables.has_stand_ins
    assert not LayerTables.build(torch.eye(33), torch.device("cpu")).has_stand_ins
    order = tables.stand_ins[:, :33].long()
    assert tables.stand_ins.shape == (33, 64)
    for part, name in enumerate(("directed_loss", "directed_scale")):
        assert torch.equal(tables.stand_in_of[:, :33, part], case.statistics[name].gather(1, order))
    loss = tables.stand_in_of[:, :33, 0]
    tied = loss.diff(dim=1) == 0
    assert bool((loss.diff(dim=1) >= 0).all())
    assert bool((order.diff(dim=1)[tied] > 0).all()), "of equal ones the lowest index first"
