"""Expert parallelism in real CPU engines: right tokens, one union over all ranks, no hang.

All in float32: ranks add up the experts of a row in another order than one rank does, and in
bf16 that alone flips near-ties of a random model's greedy answers.
"""

import functools
from dataclasses import replace
from itertools import chain

import pytest

from sere_ray.engine.control import calls_of, set_policy
from sere_ray.engine.states import find_state
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, PADDING, REROUTABLE
from sere_ray.util.ports import free_port
from tests.engine.conftest import artifact_path, generate, prompts, running_engine, sere_key
from tests.engine.ranks import RANKS, run_ranks, run_rounds
from tests.models import MOE_LAYERS, NUM_EXPERTS, TOP_K
from tests.rules import oracle

pytestmark = pytest.mark.engine
EXPERT_COUNTERS = ("experts_before", "experts_after", "critical_kept")


def parallel_rounds(folder, key, rounds, **options):
    options = {"sere": key, "enable_expert_parallel": True, **options}
    options |= {"dtype": "float32", "distributed_executor_backend": "uni"}
    return run_ranks(run_rounds, free_port(), folder, options, rounds)


def split(architecture):
    """``prompts()`` for two ranks.

    Of DeepSeek all are on one: vLLM's CPU kernels of latent attention answer otherwise in another
    batch, stock and without parallelism, too.
    """
    requests = prompts()
    return [requests, []] if architecture == "deepseek_v2" else [requests[:5], requests[5:]]


@pytest.fixture(scope="module")
def of_one_rank(checkpoint):
    """Answers of an engine without parallelism, to :func:`split` and to all requests in one batch:
    ``[[of the first, of the second, of all] at S = K, the same at S = 1]``."""

    @functools.cache
    def answers(architecture):
        folder = checkpoint(architecture)
        policies = policies_of(folder)
        found = []
        with running_engine(folder, policies[0], dtype="float32") as engine:
            for policy in policies:
                set_policy(engine, Policy.parse(policy))
                batches = [*split(architecture), prompts()]
                found.append([generate(engine, batch)[0] if batch else [] for batch in batches])
        return found

    return answers


def policies_of(folder):
    """S = K, then S = 1."""
    key = sere_key(folder, min_primary_experts=0, select_top_k=TOP_K)
    return [key, {**key, "select_top_k": 1}]


# --- tensor parallel: every rank sees every row ------------------------------------------------


def owners(worker):
    return {layer: o.tolist() for layer, o in find_state(worker.vllm_config).owner.items()}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen2_moe"])
def test_tensor_parallel_ranks_give_the_tokens_of_one_and_count_alike(
    checkpoint, architecture, of_one_rank, monkeypatch
):
    folder = checkpoint(architecture)
    policies = policies_of(folder)
    expected = of_one_rank(architecture)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "dtype": "float32"}
    with running_engine(folder, policies[0], **options) as engine:
        for policy, (*_, answers) in zip(policies, expected, strict=True):
            set_policy(engine, Policy.parse(policy))
            assert generate(engine, prompts())[0] == answers
        placed = engine.collective_rpc(owners)
        counters = calls_of(engine).counters(reset=True)
    assert placed == [{layer: [0] * 8 + [1] * 8 for layer in MOE_LAYERS[architecture]}] * RANKS
    for of_rank in counters:
        for kind in ("decode_only", "mixed"):
            of_rank[kind].pop("forward_seconds")
    assert counters[0] == counters[1]
    assert sum(counters[0]["decode_only"]["slots_rerouted"]) > 0


def test_tensor_parallel_ranks_without_expert_parallelism(checkpoint, of_one_rank, monkeypatch):
    """Each rank routes every row by itself: were a logit of one a bit off, ids would differ."""
    folder = checkpoint("qwen3_moe")
    policies = policies_of(folder)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with running_engine(folder, policies[0], tensor_parallel_size=2, dtype="float32") as engine:
        for policy, (*_, answers) in zip(policies, of_one_rank("qwen3_moe"), strict=True):
            set_policy(engine, Policy.parse(policy))
            assert generate(engine, prompts())[0] == answers
        counters = calls_of(engine).counters(reset=True)
    for of_rank in counters:
        for kind in ("decode_only", "mixed"):
            of_rank[kind].pop("forward_seconds")
    assert counters[0] == counters[1]
    assert sum(counters[0]["decode_only"]["slots_rerouted"]) > 0


def test_round_robin_placement_gives_the_tokens_of_linear(checkpoint, monkeypatch):
    """vLLM has it for models with expert groups; with data parallel ranks only under DeepEP."""
    folder = checkpoint("deepseek_v2")
    policies = policies_of(folder)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "dtype": "float32"}
    answers, placed = {}, {}
    for placement in ("linear", "round_robin"):
        options["expert_placement_strategy"] = placement
        with running_engine(folder, policies[0], **options) as engine:
            placed[placement] = engine.collective_rpc(owners)
            answers[placement] = []
            for policy in policies:
                set_policy(engine, Policy.parse(policy))
                answers[placement].append(generate(engine, prompts())[0])
    layers = MOE_LAYERS["deepseek_v2"]
    assert placed["linear"] == [{i: [0] * 8 + [1] * 8 for i in layers}] * RANKS
    assert placed["round_robin"] == [{i: [0, 1] * 8 for i in layers}] * RANKS
    assert answers["round_robin"] == answers["linear"]
    assert answers["linear"][0] != answers["linear"][1]


# --- data parallel: every rank has rows of its own ---------------------------------------------


@pytest.mark.parametrize("dispatch", ["allgather", "all_to_all"])
@pytest.mark.parametrize("architecture", ["qwen2_moe", "deepseek_v2"])
def test_data_parallel_ranks_give_the_tokens_of_one(
    checkpoint, architecture, dispatch, of_one_rank
):
    folder = checkpoint(architecture)
    policies, requests = policies_of(folder), split(architecture)
    rounds = [{"policy": p, "requests": requests, "tokens": [12, 12]} for p in policies]
    ranks = parallel_rounds(folder, {**policies[0], "dispatch": dispatch}, rounds)
    (*exact, _), (*_, together) = of_one_rank(architecture)
    assert [ranks[rank][0]["answers"] for rank in range(RANKS)] == exact
    # Prompts of 8 requests fit into one step, so both engines form the same batches.
    assert ranks[0][1]["answers"] + ranks[1][1]["answers"] == together


@pytest.fixture(scope="module")
def rounds(checkpoint):
    """Uneven rounds of one pair of engines: ``(similarity, policy and ranks' reports by name)``."""
    from sere_ray.artifact.similarity import SimilarityArtifact

    folder = checkpoint("qwen3_moe")
    key = sere_key(folder, select_top_k=1, threshold=0.7, min_primary_experts=3)
    long, short = prompts(6, seed=1, length=(40, 90)), prompts(3, seed=2, length=(3, 9))
    tasks = {
        "one finishes early": (key, [long, short], [30, 4]),
        "one is idle": (key, [short, []], [9, 9]),
        "the other is idle": (key, [[], short], [9, 9]),
        "local": ({**key, "union": "local"}, [long, short], [6, 12]),
        "observe": ({**key, "mode": "observe"}, [short, long], [5, 5]),
        "off": ({**key, "mode": "off"}, [short, long], [5, 5]),
    }
    reports = parallel_rounds(
        folder,
        key,
        [{"policy": p, "requests": r, "tokens": t} for p, r, t in tasks.values()],
        max_num_batched_tokens=64,  # prompts in chunks, so that steps are mixed
    )
    similarity = {
        layer: matrix.tolist()
        for layer, matrix in SimilarityArtifact.load(artifact_path(folder)).layers.items()
    }
    return similarity, {
        name: (task[0], [reports[rank][i] for rank in range(RANKS)])
        for i, (name, task) in enumerate(tasks.items())
    }


def expected_of(policy, similarity, layer, ids, weights, kinds):
    """Slots that repeat an expert of their row are -1: experts of other ranks are skipped here."""
    found = oracle.reroute(
        ids,
        weights,
        similarity[layer],
        num_slots=TOP_K,
        row_kind=kinds,
        select_top_k=policy["select_top_k"],
        threshold=policy["threshold"],
        min_primary_experts=policy["min_primary_experts"],
    )
    return replace(found, ids=oracle.merge(found.ids, weights, kinds, NUM_EXPERTS)[0])


def merged_calls(reports):
    """Every call of the rule with the rows of all ranks: layer, ids, weights, kinds, new ids."""
    for calls in zip(*(report["calls"] for report in reports), strict=True):
        layers, *numbers = zip(*calls, strict=True)
        assert len(set(layers)) == 1
        yield layers[0], *(list(chain.from_iterable(of_ranks)) for of_ranks in numbers)


@pytest.mark.parametrize("name", ["one finishes early", "one is idle", "the other is idle"])
def test_union_is_that_of_all_rows(rounds, name):
    similarity, reports = rounds
    policy, ranks = reports[name]
    sums, decode_rows = {}, {"decode_only": 0, "mixed": 0}
    for layer, ids, weights, kinds, new_ids in merged_calls(ranks):
        if REROUTABLE not in kinds:
            assert new_ids == ids
            continue
        expected = expected_of(policy, similarity, layer, ids, weights, kinds)
        assert new_ids == expected.ids
        rows = [row for row, kind in zip(new_ids, kinds, strict=True) if kind != PADDING]
        read = {expert for row in rows for expert in row} - {-1}
        assert len(read) == expected.experts_after
        kind = "mixed" if EXACT in kinds else "decode_only"
        names = (*EXPERT_COUNTERS, "slots", "merged")
        total = sums.setdefault((kind, layer), dict.fromkeys(names, 0))
        for counter in EXPERT_COUNTERS:
            total[counter] += getattr(expected, counter)
        total["slots"] += expected.slots_rerouted
        total["merged"] += sum(row.count(-1) for row in rows)
        decode_rows[kind] += kinds.count(REROUTABLE) if layer == 0 else 0
    for kind in {kind for kind, _ in sums}:
        counters = [report["counters"][kind] for report in ranks]
        assert counters[0]["steps"] == counters[1]["steps"]
        assert sum(of_rank["decode_rows"] for of_rank in counters) == decode_rows[kind]
        for counter in EXPERT_COUNTERS:
            recount = [sums[kind, layer][counter] for layer in range(4)]
            assert [of_rank[counter] for of_rank in counters] == [recount] * RANKS
        for counter, name in (("slots_rerouted", "slots"), ("slots_merged", "merged")):
            slots = zip(*(of_rank[counter] for of_rank in counters), strict=True)
            assert list(map(sum, slots)) == [sums[kind, layer][name] for layer in range(4)]
    assert any(total["merged"] for total in sums.values())


def test_rounds_hold_what_they_are_for(rounds):
    _, reports = rounds
    kinds = [call[3] for report in reports["one finishes early"][1] for call in report["calls"]]
    assert any(PADDING in k for k in kinds), "no rank ran a dummy pass"
    assert any(EXACT in k and REROUTABLE in k for k in kinds), "no step was mixed"
    assert [len(report["answers"]) for report in reports["one is idle"][1]] == [3, 0]
    critical = sum(reports["one finishes early"][1][0]["counters"]["decode_only"]["critical_kept"])
    assert critical > 0


def test_local_union_is_that_of_the_own_rows(rounds):
    similarity, reports = rounds
    policy, ranks = reports["local"]
    differs = 0
    for report in ranks:
        for layer, ids, weights, kinds, new_ids in report["calls"]:
            expected = expected_of(policy, similarity, layer, ids, weights, kinds)
            assert new_ids == (expected.ids if REROUTABLE in kinds else ids)
    for layer, ids, weights, kinds, new_ids in merged_calls(ranks):
        differs += new_ids != expected_of(policy, similarity, layer, ids, weights, kinds).ids
    assert differs > 0


@pytest.mark.parametrize("mode", ["observe", "off"])
def test_modes_that_change_nothing(rounds, mode):
    _, reports = rounds
    _, ranks = reports[mode]
    for _, ids, _, _, new_ids in merged_calls(ranks):
        assert new_ids == ids
    counted = [sum(r["counters"]["decode_only"]["experts_before"]) for r in ranks]
    assert counted[0] == counted[1]
    assert (counted[0] > 0) == (mode == "observe")
    assert max(max(row) for call in ranks[0]["calls"] for row in call[1]) < NUM_EXPERTS
