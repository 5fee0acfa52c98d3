"""How patches of a GPU engine find its state, on fakes of what vLLM hands them; no GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts import marlin_moe, triton_moe
from vllm.v1.worker.gpu import dp_utils

from sere_ray.engine import states
from sere_ray.engine.gpu import patches, union_patches
from sere_ray.engine.gpu.rank_words import read_words, write_words
from sere_ray.rules import REROUTABLE
from sere_ray.util.errors import UnsupportedError

IDS = torch.zeros((2, 4), dtype=torch.int32)


@pytest.fixture
def stock(monkeypatch):
    """What vLLM sorts by, and the experts' `apply`, which calls it by its module-global name."""

    def sort(topk_ids, config, *rest, **options):
        return "sorted by vLLM"

    def apply(experts, *args, **call):
        arguments = (IDS, {"BLOCK_SIZE_M": 16}, 2)
        return triton_moe._prepare_expert_assignment(*arguments, ignore_invalid_experts=True)

    monkeypatch.setattr(triton_moe, "_prepare_expert_assignment", sort)
    monkeypatch.setattr(patches, "apply_experts", lambda original, experts, **call: apply(experts))
    return SimpleNamespace(sort=sort, apply=apply)


def deferring(answer):
    asked = []

    def align(topk_ids, block_size, skips_foreign=False):
        asked.append((topk_ids, block_size, skips_foreign))
        return answer

    return SimpleNamespace(deferred=True, align=align, asked=asked)


@pytest.mark.parametrize("args", [(), (1,)])
@pytest.mark.parametrize(("answer", "expected"), [("ours", "ours"), (None, "sorted by vLLM")])
def test_experts_of_a_deferred_layer_have_their_slots_sorted_by_its_state(
    stock, args, answer, expected
):
    state = deferring(answer)
    experts = SimpleNamespace(sere_state=state)
    assert patches._compute_experts(stock.apply, experts, *args) == expected
    assert state.asked == [(IDS, 16, True)]
    assert triton_moe._prepare_expert_assignment is stock.sort


@pytest.mark.parametrize(("answer", "expected"), [("ours", "ours"), (None, "sorted by vLLM")])
def test_marlins_slots_too(monkeypatch, answer, expected):
    def sort(topk_ids, block_size, *rest, **options):
        return "sorted by vLLM"

    def apply(experts, **call):
        return marlin_moe.moe_align_block_size(IDS, 8, 4, None, ignore_invalid_experts=True)

    monkeypatch.setattr(marlin_moe, "moe_align_block_size", sort)
    state = deferring(answer)
    assert patches._compute_with_marlin(apply, SimpleNamespace(sere_state=state)) == expected
    assert state.asked == [(IDS, 8, False)]
    assert patches._compute_with_marlin(apply, SimpleNamespace()) == "sorted by vLLM"
    assert len(state.asked) == 1
    assert marlin_moe.moe_align_block_size is sort


def test_other_experts_are_left_to_vllm(stock):
    idle = SimpleNamespace(deferred=None)
    for experts in (SimpleNamespace(), SimpleNamespace(sere_state=idle)):
        assert patches._compute_experts(stock.apply, experts) == "sorted by vLLM"


def test_vllm_sorts_again_after_a_failure(stock):
    def fail(experts, *args, **call):
        raise RuntimeError("out of memory")

    experts = SimpleNamespace(sere_state=deferring("ours"))
    with pytest.raises(RuntimeError):
        patches._compute_experts(fail, experts, 1)
    assert triton_moe._prepare_expert_assignment is stock.sort


def test_gathered_ids_go_to_the_state_that_expects_them():
    def prepare(back_end, *arguments):
        return "rows", None, None, "ids", "weights"

    taken = []
    union = SimpleNamespace(expects_ids=True)
    state = SimpleNamespace(union=union, take_gathered=lambda **of: taken.append(of))
    for back_end in (SimpleNamespace(), SimpleNamespace(sere_state=state)):
        assert union_patches._prepare(prepare, back_end, 1)[3] == "ids"
    assert taken == [{"topk_ids": "ids", "topk_weights": "weights"}]
    union.expects_ids = False
    union_patches._prepare(prepare, SimpleNamespace(sere_state=state), 1)
    assert len(taken) == 1


def sums_of_032(monkeypatch, add):
    """Put `add(table)` where vLLM 0.32 sums; gives the sum as the module calls it."""
    dist = SimpleNamespace(all_reduce=lambda table, group: add(table))
    monkeypatch.setattr(dp_utils, "dist", dist, raising=False)
    return "dist", lambda table: dp_utils.dist.all_reduce(table, group=None)


def sums_of_033(monkeypatch, add):
    monkeypatch.delattr(dp_utils, "dist", raising=False)
    group = SimpleNamespace(cpu_all_reduce_=add)
    monkeypatch.setattr(dp_utils, "get_dp_group", lambda: group, raising=False)
    return "get_dp_group", lambda table: dp_utils.get_dp_group().cpu_all_reduce_(table)


@pytest.mark.parametrize("sums", [sums_of_032, sums_of_033])
@pytest.mark.parametrize("has_work", [True, False])
def test_the_engine_of_a_pass_is_that_of_its_parallel_configuration(monkeypatch, has_work, sums):
    parallel, other = SimpleNamespace(), SimpleNamespace()
    words, begun = write_words(3, 5, np.full(2, REROUTABLE, np.int8), 32), []
    state = SimpleNamespace(
        union=SimpleNamespace(group=SimpleNamespace(data_rank=1)),
        words=lambda: words,
        begin_pass=lambda table, sizes: begun.append((table, sizes)),
    )
    monkeypatch.setattr(states, "_states", {})
    states.add_state(SimpleNamespace(parallel_config=parallel), state)
    tables = []
    name, all_reduce = sums(monkeypatch, lambda table: tables.append(table.clone()))
    before = getattr(dp_utils, name)

    def sync(batch, parallel_config):
        all_reduce(torch.zeros((6, 2), dtype=torch.int32))
        agreed = SimpleNamespace(num_tokens_across_dp=torch.tensor([1, 2]))
        return batch, agreed if has_work else None

    for configuration in (other, None, parallel):
        assert union_patches._sync(sync, "batch", parallel_config=configuration)[0] == "batch"
    assert [len(table) for table in tables] == [6, 6, 6 + len(words)]
    if not has_work:
        assert begun == []
        return
    ((table, sizes),) = begun
    assert sizes == [1, 2]
    assert read_words(table[:, 1]).kinds.tolist() == [REROUTABLE] * 2
    assert getattr(dp_utils, name) is before


@pytest.mark.parametrize(("tags", "times"), [(None, 1), (["weights"], 1), (["kv_cache"], 0)])
def test_what_steps_read_is_written_again_when_weights_are_back(monkeypatch, tags, times):
    done, config = [], SimpleNamespace(parallel_config=SimpleNamespace())
    worker = SimpleNamespace(vllm_config=config)
    state = SimpleNamespace(write_again=lambda: done.append("ours"))

    def wake(worker, tags):
        done.append("vLLM")

    patches.wake_up(wake, worker, tags=tags)  # an engine without the key
    monkeypatch.setitem(states._states, id(config.parallel_config), (config.parallel_config, state))
    patches.wake_up(wake, worker, tags=tags)
    assert done == ["vLLM", "vLLM"] + ["ours"] * times


def test_a_sleep_that_gives_weights_away_is_refused(monkeypatch, has_words):
    asked, config = [], SimpleNamespace(parallel_config=SimpleNamespace())
    worker = SimpleNamespace(vllm_config=config)
    patches.sleep(lambda worker, level: asked.append(level), worker, level=2)
    monkeypatch.setitem(
        states._states, id(config.parallel_config), (config.parallel_config, SimpleNamespace())
    )
    patches.sleep(lambda worker, level: asked.append(level), worker)
    with pytest.raises(UnsupportedError) as error:
        patches.sleep(lambda worker, level: asked.append(level), worker, level=2)
    assert asked == [2, 1]
    has_words(str(error.value), "sleep(level = 2)", "use level 1")
