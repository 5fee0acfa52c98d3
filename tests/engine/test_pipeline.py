"""Pipeline parallelism in real CPU engines: each stage its layers, all of them one policy a step.

Compiled, as vLLM's CPU build crashes with eager stages. GPUs: ``test_gpu_features.py``.
"""

import random
import time

import pytest
import torch

from sere_ray import reroute
from sere_ray.engine.control import calls_of, read_counters, set_policy
from sere_ray.engine.states import find_state
from sere_ray.policy.policy import Policy
from sere_ray.rules import EXACT, REROUTABLE
from tests.engine.conftest import generate, prompts, random_artifact, running_engine, sere_key
from tests.models import TOP_K

pytestmark = [pytest.mark.engine, pytest.mark.nightly]
OPTIONS = {"dtype": "float32", "enforce_eager": False, "max_num_batched_tokens": 64}
"""Prompts in chunks, so that some steps are mixed."""
STAGES = {"pipeline_parallel_size": 2, **OPTIONS}


def watch(worker):
    """Note in a worker which policy and row kinds each call of the rule had; check its ids."""
    state, choose = find_state(worker.vllm_config), type(find_state(worker.vllm_config)).choose
    worker.sere_seen = []

    def record(layer, ids, weights, logits, hidden):
        new_ids, new_weights = choose(state, layer, ids, weights, logits, hidden)
        kinds, bound = state.row_kind[: len(ids)].clone(), state.bound
        wanted = ids
        if REROUTABLE in kinds:
            wanted = reroute(
                ids,
                weights,
                state.similarity[layer],
                row_kind=kinds,
                select_top_k=bound.select_top_k,
                min_primary_experts=bound.min_primary_experts,
            )
        right = torch.equal(new_ids, wanted)
        worker.sere_seen.append((layer, bound.select_top_k, kinds.tolist(), right))
        return new_ids, new_weights

    state.choose = record


def take(worker):
    """What was noted since."""
    return worker.sere_seen


def test_stages_give_the_tokens_of_one_and_switch_together(checkpoint, monkeypatch):
    folder = checkpoint("qwen3_moe")
    with running_engine(folder, **OPTIONS) as engine:
        stock = generate(engine, prompts())[0]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    key, rng = sere_key(folder, min_primary_experts=0), random.Random(1)
    with running_engine(folder, key, **STAGES) as engine:
        for changes in ({"select_top_k": TOP_K}, {"mode": "off"}, {"mode": "observe"}):
            set_policy(engine, Policy.parse({**key, **changes}))
            assert generate(engine, prompts())[0] == stock
        set_policy(engine, Policy.parse(key))
        read_counters(engine, reset=True)
        assert generate(engine, prompts())[0] != stock
        counts = read_counters(engine, reset=True)["decode_only"]
        for before, after in zip(counts["experts_before"], counts["experts_after"], strict=True):
            assert 0 < after < before
        engine.collective_rpc(watch)
        switch_under_load(engine, key, rng)
        reports, seen = calls_of(engine).counters(reset=True), engine.collective_rpc(take)
    for kind in ("decode_only", "mixed"):
        first, second = (report[kind] for report in reports)
        for name in ("steps", "steps_counted", "rows", "decode_rows"):
            assert first[name] == second[name]
        assert first["steps"] > 0
        assert not any(first["experts_before"][2:])
        assert not any(second["experts_before"][:2])
    assert [sorted({layer for layer, *_ in of_stage}) for of_stage in seen] == [[0, 1], [2, 3]]
    first, second = ([of_call[1:] for of_call in of_stage] for of_stage in seen)
    assert first == second, "stages differ in a step's policy or rows"
    assert all(right for *_, right in first)
    assert len({size for size, *_ in first}) == 3
    assert any({EXACT, REROUTABLE} <= set(kinds) for _, kinds, _ in first)


def switch_under_load(engine, key, rng):
    """Steps are in flight while the policy changes."""
    from vllm import SamplingParams

    core = engine.llm_engine
    sampling = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, detokenize=False)
    for number, request in enumerate(prompts(20, seed=4)):
        core.add_request(str(number), request, sampling)
    while core.has_unfinished_requests():
        core.step()
        if rng.random() < 0.3:
            size = rng.choice([1, 2, TOP_K])
            set_policy(engine, Policy.parse({**key, "select_top_k": size}))


def test_the_second_stage_checks_its_layers(checkpoint, tmp_path, monkeypatch, capfd):
    folder = checkpoint("qwen3_moe")
    artifact = random_artifact(folder)
    fingerprints = {**artifact.metadata.router_fingerprint, 3: "0" * 32}
    random_artifact(folder, router_fingerprint=fingerprints).save(tmp_path / "other.safetensors")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    key = sere_key(folder, similarity=str(tmp_path / "other.safetensors"))
    with (
        pytest.raises(Exception, match="initialization failed"),
        running_engine(folder, key, **STAGES),
    ):
        pass
    said, until = "", time.monotonic() + 20
    while "router fingerprint of layer 3" not in said:  # its process may write later
        assert time.monotonic() < until, said
        said += "".join(capfd.readouterr())
        time.sleep(0.1)
