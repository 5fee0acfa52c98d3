"""Real vLLM engines on CPU: what is re-routed, what stays exact, what is counted."""

import numpy as np
import pytest

from sere_ray.engine.control import calls_of, read_counters, set_policy
from sere_ray.engine.cpu.state import CpuState
from sere_ray.engine.signatures import of_workers, project
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, PADDING, REROUTABLE
from tests.engine.conftest import generate, prompts, running_engine, sere_key
from tests.models import ARCHITECTURES, MOE_LAYERS, TOP_K
from tests.rules import oracle

pytestmark = pytest.mark.engine
COUNTERS = ("experts_before", "experts_after", "slots_rerouted", "critical_kept")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compared(request, checkpoint):
    """Answers of stock and of every policy, and the counters, for one architecture, eager."""
    folder = checkpoint(request.param)
    with running_engine(folder) as engine:
        stock, _ = generate(engine, prompts())
    key = sere_key(folder, min_primary_experts=0)
    answers, counters = {}, {}
    with running_engine(folder, key) as engine:
        for name, changes in {
            "S=1": {},
            "S=K": {"select_top_k": TOP_K},
            "observe": {"mode": "observe"},
            "off": {"mode": "off"},
        }.items():
            set_policy(engine, Policy.parse({**key, **changes}))
            read_counters(engine, reset=True)
            answers[name], _ = generate(engine, prompts())
            counters[name] = read_counters(engine)
    return request.param, stock, answers, counters


@pytest.mark.parametrize("policy", ["S=K", "observe", "off"])
def test_policies_that_change_nothing_give_stock_tokens(compared, policy):
    _, stock, answers, _ = compared
    assert answers[policy] == stock


def test_rerouting_changes_what_is_read(compared):
    architecture, stock, answers, counters = compared
    decode = counters["S=1"]["decode_only"]
    assert counters["S=1"]["layers"] == list(MOE_LAYERS[architecture])
    assert decode["steps"] == 11
    assert decode["decode_rows"] == 8 * 11
    for before, after, slots in zip(
        decode["experts_before"], decode["experts_after"], decode["slots_rerouted"], strict=True
    ):
        assert after < before
        assert slots > 0
    assert answers["S=1"] != stock


def test_observe_counts_what_on_would_read_at_the_first_step(compared):
    *_, counters = compared
    observed, done = counters["observe"]["decode_only"], counters["S=1"]["decode_only"]
    assert observed["steps"] == done["steps"]
    assert all(
        a < b for a, b in zip(observed["experts_after"], observed["experts_before"], strict=True)
    )


def test_off_counts_steps_only(compared):
    *_, counters = compared
    decode = counters["off"]["decode_only"]
    assert decode["steps"] == 11
    assert sum(decode["experts_before"]) == 0


@pytest.fixture
def recorded(monkeypatch):
    """Every call of the rule inside the engine: ids before and after, weights, row kinds."""
    calls = []
    original = CpuState.choose

    def record(self, layer, topk_ids, topk_weights, router_logits, hidden):
        new_ids, new_weights = original(self, layer, topk_ids, topk_weights, router_logits, hidden)
        kinds = self.row_kind[: topk_ids.shape[0]].tolist()
        calls.append((layer, topk_ids.tolist(), topk_weights.tolist(), kinds, new_ids.tolist()))
        return new_ids, new_weights

    monkeypatch.setattr(CpuState, "choose", record)
    return calls


def test_counters_match_a_recount_of_mixed_batches(checkpoint, recorded):
    """Chunked prefill beside decode, under load: ids and counters against the oracle."""
    folder = checkpoint("qwen3_moe")
    key = sere_key(folder, select_top_k=2, threshold=0.9, min_primary_experts=3)
    requests = prompts(12, seed=1, length=(3, 90))
    with running_engine(folder, key, max_num_batched_tokens=64, max_num_seqs=8) as engine:
        check_signatures(engine, recorded)
        read_counters(engine, reset=True)
        recorded.clear()
        generate(engine, requests, tokens=9)
        counters = read_counters(engine)
        similarity = {
            layer: engine.collective_rpc(_similarity, args=(layer,))[0] for layer in range(4)
        }
    recount = {"decode_only": {}, "mixed": {}}
    for layer, before, weights, kinds, after in recorded:
        if REROUTABLE not in kinds:
            assert after == before
            continue
        expected = oracle.reroute(
            before,
            weights,
            similarity[layer],
            num_slots=TOP_K,
            row_kind=kinds,
            select_top_k=2,
            threshold=0.9,
            min_primary_experts=3,
        )
        assert after == expected.ids
        assert PADDING not in kinds
        sums = recount["mixed" if EXACT in kinds else "decode_only"].setdefault(layer, [0] * 5)
        for position, name in enumerate(COUNTERS):
            sums[position] += getattr(expected, name)
        sums[-1] += kinds.count(REROUTABLE)
    for kind in ("decode_only", "mixed"):
        assert recount[kind], f"the load formed no {kind} step"
        for position, name in enumerate(COUNTERS):
            found = counters[kind][name]
            assert found == [recount[kind][layer][position] for layer in range(4)]
        assert counters[kind]["decode_rows"] == recount[kind][0][4]
    rows = sum(counters[kind]["decode_rows"] for kind in ("decode_only", "mixed"))
    assert rows == 12 * (9 - 1)  # the first token of an answer comes from a prefill row


def check_signatures(engine, recorded):
    """Experts of prompts, in chunks beside other requests' answers, against a recount."""
    calls = calls_of(engine)
    assert of_workers(calls.signatures()).signatures == [], "the first call begins counting"
    asked = prompts(3, seed=2, length=(70, 100))
    lone = []
    for one in asked:
        recorded.clear()
        generate(engine, [one], tokens=3)
        rows = [(layer, before, kinds) for layer, before, _, kinds, _ in recorded]
        lone.append(np.zeros((4, 16), dtype=np.int64))
        for layer, before, kinds in rows:
            for ids, kind in zip(before, kinds, strict=True):
                lone[-1][layer, ids] += kind == EXACT
    taken = of_workers(calls.signatures())
    assert len(taken.model) == 16
    lengths = [len(one["prompt_token_ids"]) for one in asked]
    assert [one.rows for one in taken.signatures] == lengths
    for counts, length, one in zip(lone, lengths, taken.signatures, strict=True):
        assert counts.sum(axis=1).tolist() == [TOP_K * length] * 4
        assert one.vector == project(counts, length).tobytes()
    assert of_workers(calls.signatures()).signatures == []


def _similarity(worker, layer):
    from sere_ray.engine.states import find_state

    return find_state(worker.vllm_config).similarity[layer].tolist()


def test_preempted_requests_recompute_exactly(checkpoint, recorded):
    folder = checkpoint("qwen3_moe")
    key = sere_key(folder, min_primary_experts=0)
    requests = prompts(8, seed=2, length=(100, 120))
    # Room for about 5 of 8 requests of up to 376 tokens: the others wait, or are preempted.
    with running_engine(folder, key, kv_cache_memory_bytes=2_600_000, block_size=32) as engine:
        read_counters(engine, reset=True)
        recorded.clear()
        _, outputs = generate(engine, requests, tokens=256)
        counters = read_counters(engine)
    assert all(len(output.outputs[0].token_ids) == 256 for output in outputs)
    rows = sum(counters[kind]["decode_rows"] for kind in ("decode_only", "mixed"))
    assert rows <= 8 * 255
    exact_rows = sum(kinds.count(EXACT) for layer, _, _, kinds, _ in recorded if layer == 0)
    prompt_rows = sum(len(request["prompt_token_ids"]) for request in requests)
    assert exact_rows > prompt_rows, "no request was preempted: lower kv_cache_memory_bytes"
    assert exact_rows + rows >= prompt_rows + 8 * 255


def test_default_floor_keeps_batch_one_exact(checkpoint):
    folder = checkpoint("qwen3_moe")
    with running_engine(folder) as engine:
        stock, _ = generate(engine, prompts(1), tokens=24)
    with running_engine(folder, sere_key(folder)) as engine:
        answer, _ = generate(engine, prompts(1), tokens=24)
        assert sum(read_counters(engine)["decode_only"]["slots_rerouted"]) == 0
    assert answer == stock


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_compiled_graph_is_stock_at_s_equal_k_and_reroutes_at_one(checkpoint, architecture):
    """The least and the most that a gate does; eager engines have all architectures, above."""
    folder = checkpoint(architecture)
    with running_engine(folder, enforce_eager=False) as engine:
        stock, _ = generate(engine, prompts())
    key = sere_key(folder, min_primary_experts=0, select_top_k=TOP_K)
    with running_engine(folder, key, enforce_eager=False) as engine:
        same, _ = generate(engine, prompts())
        set_policy(engine, Policy.parse({**key, "select_top_k": 1}))
        read_counters(engine, reset=True)
        changed, _ = generate(engine, prompts())
        decode = read_counters(engine)["decode_only"]
    assert same == stock
    assert changed != stock
    assert decode["decode_rows"] == 8 * 11
    assert all(
        a < b for a, b in zip(decode["experts_after"], decode["experts_before"], strict=True)
    )
