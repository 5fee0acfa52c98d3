"""Data with tensor parallelism on GPU engines, experts over all ranks, without a GPU.

Two data-parallel ranks of two workers each; kernels run in the emulator. vLLM cuts the rows of a
rank into a shard for each worker (``sharded``), or every worker routes all of them (``whole``).
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sere_ray.engine.control import of_engine
from sere_ray.engine.gpu.rank_group import RankGroup
from sere_ray.engine.layer_checks import check_shards
from sere_ray.rules import EXACT, PADDING, REROUTABLE, count, sere
from sere_ray.util.errors import PolicyError, UnsupportedError
from sere_ray.util.ports import free_port
from tests.engine.ranks import RANKS, gloo_group, run_ranks
from tests.engine.test_cuda_union import (
    LAYERS,
    MARGIN,
    PASSES,
    SPARE,
    E,
    Group,
    emulated,
    needs_compiler,
    padded,
    rule_of,
)
from tests.kernel.margin_cases import EMULATED, by_reference

__all__ = ["emulated"]
WORKERS = 2
ROWS = {"sharded": WORKERS, "whole": 1}
"""Shards of a data-parallel rank's rows."""


def gathered_kinds(kinds, sizes, shards):
    """Row kinds in the order in which vLLM gathers rows: padded to shards of one length."""
    return padded(kinds, [-(-size // shards) * shards for size in sizes])


@needs_compiler
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("way", ["gathered", "unsorted", "elsewhere"])
@pytest.mark.parametrize("keys", [{}, {"threshold": 0.9, "min_primary_experts": 3}])
def test_four_ranks_derive_the_ids_of_the_whole_batch(emulated, rows, way, keys):
    shards = ROWS[rows]
    group = Group(workers=WORKERS, shards=shards, **keys)
    options = {"block": None if way == "unsorted" else 16, "gathers": way != "elsewhere"}
    sums = {name: np.zeros((len(LAYERS), 4), np.int64) for name in ("decode_only", "mixed")}
    decode_rows = {name: np.zeros(RANKS, np.int64) for name in sums}
    for seed, (kinds, sizes) in enumerate(PASSES.values()):
        row_kind = gathered_kinds(kinds, sizes, shards)
        name = "mixed" if EXACT in row_kind else "decode_only"
        active = REROUTABLE in row_kind
        decode_rows[name] += [of_rank.count(REROUTABLE) for of_rank in kinds]
        passed = group.run_pass(kinds, sizes, seed=seed, **options)
        for position, (layer, (before, weights, after)) in enumerate(passed.items()):
            new, arguments = before, (before, weights, group.similarity[layer])
            if active:
                rule = rule_of(group.key, int((row_kind == REROUTABLE).sum()))
                new = sere.reroute(*arguments, row_kind=row_kind, **rule)
                rerouting = sere.find_rerouting(*arguments, row_kind=row_kind, **rule)
                counts = count(rerouting, before, new, row_kind)
                sums[name][position] += [int(n) for n in counts]
            assert len(after) == RANKS * WORKERS
            for of_rank in after:
                assert torch.equal(of_rank, new)
    reports = [{**state.read_counters(reset=True), "stage": 0} for state in group.states]
    engines = [of_engine(reports[:WORKERS]), of_engine(reports[WORKERS:])]
    for name, expected in sums.items():
        for report in (*reports, *engines):
            for column, field in enumerate(("experts_before", "experts_after")):
                assert report[name][field] == expected[:, column].tolist()
            if way != "elsewhere":
                busiest = report["gathered"][name]["busiest_read"]
                assert all(4 * b >= n for b, n in zip(busiest, expected[:, 1], strict=True))
        slots = zip(*(engine[name]["slots_rerouted"] for engine in engines), strict=True)
        assert list(map(sum, slots)) == expected[:, 2].tolist()
        for engine, of_workers, rows_of_rank in zip(
            engines, (reports[:WORKERS], reports[WORKERS:]), decode_rows[name], strict=True
        ):
            found = {report[name]["decode_rows"] for report in (engine, *of_workers)}
            assert found == {rows_of_rank}, "every worker counts the rows of its engine"
    assert sums["decode_only"][:, 2].all()
    assert "shards" not in engines[0]


@needs_compiler
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("keys", [MARGIN, SPARE, {**MARGIN, "balance_ranks": True}])
def test_four_ranks_keep_the_experts_that_the_whole_batch_demands(emulated, rows, gathers, keys):
    shards, changed = ROWS[rows], 0
    group = Group(workers=WORKERS, shards=shards, **keys)
    bound, last = group.states[0].bound, len(LAYERS) - 1
    owner = group.placements[0].owner.long()
    knobs = bound.of_layer(last, E, None, owner, group.statistics[LAYERS[last]])
    for seed, (kinds, sizes) in enumerate(PASSES.values()):
        row_kind = gathered_kinds(kinds, sizes, shards)
        before, weights, after = group.run_pass(kinds, sizes, seed=seed, gathers=gathers)[2]
        given = group.logits.gather(1, before.long().clamp(min=0))  # weights changed in place
        ids, new_weights, _ = by_reference(
            before, given, group.logits, row_kind, knobs, EMULATED, rule=keys["rule"]
        )
        known = row_kind != PADDING
        torch.testing.assert_close(weights[known], new_weights[known])
        for of_rank in after:
            assert torch.equal(of_rank, ids)
        changed += int((ids != before)[known].sum())
    assert changed > 20


@needs_compiler
@pytest.mark.parametrize("rows", ROWS)
def test_policies_switch_on_four_ranks_in_one_pass(emulated, rows):
    """vLLM tells the workers of an engine between the same two passes; engines apart."""
    group = Group(workers=WORKERS, shards=ROWS[rows])
    off = {**group.key, "mode": "off"}
    for engine, switched in ((group.states[:WORKERS], False), (group.states[WORKERS:], True)):
        for state in engine:
            state.set_policy(off)
        for before, _, after in group.run_pass(*PASSES["full"]).values():
            assert {torch.equal(before, of_rank) for of_rank in after} == {switched}
    assert {tuple(state.versions.told) for state in group.states} == {(1,)}


def compare(rank, port, cases):
    group = gloo_group(rank, port)
    from sere_ray.engine.agreement import Told, Versions
    from sere_ray.policy.policy import Policy

    bound = Policy.parse({"similarity": "f", "select_top_k": 1}).for_model(top_k=2)
    versions, found = Versions(Told(bound, None)), []
    for checksums in cases:
        versions.checksum = checksums[rank]
        try:
            versions.check_alike(group)
            found.append(None)
        except PolicyError as error:
            found.append(str(error))
    return found


def test_workers_that_start_with_other_files_all_refuse(has_words):
    most = 0xFFFFFFFF  # of 32 bits
    first, second = run_ranks(compare, free_port(), [(most, most), (0, most), (most, 1), (0, 0)])
    assert first == second
    assert [message is None for message in first] == [True, False, False, True]
    has_words(first[1], "tensor-parallel workers", "artifact", "the same files")


def test_a_layer_that_cuts_rows_in_another_way_is_refused(has_words):
    runner = SimpleNamespace(layer_name="l", moe_config=SimpleNamespace(sp_size=1))
    check_shards(runner, 1)
    with pytest.raises(UnsupportedError) as caught:
        check_shards(runner, 2)
    has_words(str(caught.value), "'l'", "into 1 shards", "into 2", "tensor_parallel_size = 1")


# --- what vLLM does with the rows of a rank -------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 3])
def test_shards_are_those_of_vllm(monkeypatch, workers):
    from vllm.forward_context import _compute_sp_num_tokens
    from vllm.model_executor.models import utils

    sizes = [8, 3, 1, 34]
    ranks = RankGroup(0, len(sizes) * workers, None, None, None, shards=workers)
    rows = [np.arange(1, size + 1, dtype=np.int8) for size in sizes]
    found, lengths = ranks.layout(rows, sizes)
    assert lengths == _compute_sp_num_tokens(torch.tensor(sizes), workers)
    monkeypatch.setattr(utils, "get_tensor_model_parallel_world_size", lambda: workers)
    for rank, (of_rank, length) in enumerate(zip(found, lengths, strict=True)):
        monkeypatch.setattr(utils, "get_tensor_model_parallel_rank", lambda r=rank: r % workers)
        whole = torch.from_numpy(rows[rank // workers])[:, None]
        shard = utils.sequence_parallel_chunk_impl(whole)[:, 0]
        assert shard.tolist() == of_rank.tolist() + [0] * (length - len(of_rank))


def test_vllm_gathers_shards_among_all_ranks_in_the_order_of_experts(monkeypatch):
    from vllm.distributed.device_communicators import all2all
    from vllm.model_executor.layers.fused_moe import config

    for name in ("get_ep_group", "get_dp_group"):
        monkeypatch.setattr(all2all, name, lambda name=name: name)
    alone = SimpleNamespace(world_size=1)
    monkeypatch.setattr(all2all, "get_pcp_group", lambda: alone)
    manager = SimpleNamespace(dp_world_size=2, use_ep=True)
    group_of = all2all.AgRsAll2AllManager._get_comm_group
    assert [group_of(manager, cut) for cut in (True, False)] == ["get_ep_group", "get_dp_group"]
    monkeypatch.setattr(config, "get_tensor_model_parallel_rank", lambda: 1)
    flat = config.FusedMoEParallelConfig.flatten_tp_across_dp_and_pcp
    assert flat(tp_size=2, dp_size=2, dp_rank=1, pcp_size=1, pcp_rank=0) == (4, 3)
    shape = RankGroup(3, 4, None, None, None, shards=2)
    assert shape.data_rank == 1


@pytest.mark.parametrize(("shards", "place"), [(2, (3, 4, 1)), (1, (1, 2, 1))])
def test_the_union_is_over_the_group_that_vllm_gathers_in(monkeypatch, shards, place):
    from vllm.distributed import parallel_state

    from sere_ray.engine.gpu.ranks import ranks_of_engine

    for name, rank, size in (("get_ep_group", 3, 4), ("get_dp_group", 1, 2)):
        group = SimpleNamespace(
            rank_in_group=rank,
            world_size=size,
            device_communicator=SimpleNamespace(pynccl_comm=None),
            device_group=None,
            cpu_group=None,
        )
        monkeypatch.setattr(parallel_state, name, lambda group=group: group)
    config = SimpleNamespace(
        aux_output_config=SimpleNamespace(enable_return_routed_experts=False),
        parallel_config=SimpleNamespace(distributed_timeout_seconds=9),
    )
    ranks = ranks_of_engine(config, E, torch.device("cpu"), shards)
    assert (ranks.rank, ranks.num_ranks, ranks.data_rank) == place
    assert ranks.shards == shards
