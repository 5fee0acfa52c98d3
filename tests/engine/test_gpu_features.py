"""What vLLM can do beside one rank on one GPU: sleep, tensor parallelism alone, pipeline stages."""

import random

import pytest
import torch

from sere_ray.engine.control import calls_of, read_counters, set_policy
from sere_ray.engine.states import find_state
from sere_ray.policy.policy import Policy
from sere_ray.util.errors import UnsupportedError
from tests.engine.conftest import generate, prompts, random_artifact, running_engine, sere_key
from tests.engine.test_gpu import GRAPHS, POLICIES, tokens_of
from tests.models import TOP_K

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def test_an_engine_that_slept_answers_as_before(checkpoint):
    folder = checkpoint("qwen3_moe")
    key = sere_key(folder, min_primary_experts=0, threshold=0.5)
    with running_engine(folder, key, enable_sleep_mode=True, **GRAPHS) as engine:
        before = generate(engine, prompts())[0]
        set_policy(engine, Policy.parse({**key, "select_top_k": 2}))
        other = generate(engine, prompts())[0]
        assert other != before
        for wake in (engine.wake_up, lambda: wake_by_parts(engine)):
            engine.sleep(level=1)
            wake()
            read_counters(engine, reset=True)
            assert generate(engine, prompts())[0] == other
            counts = read_counters(engine)["decode_only"]
            assert counts["steps"] == 11
            assert 0 < sum(counts["experts_after"]) < sum(counts["experts_before"])
        set_policy(engine, Policy.parse(key))
        assert generate(engine, prompts())[0] == before
        with pytest.raises(UnsupportedError, match=r"sleep\(level = 2\)"):
            engine.sleep(level=2)


def wake_by_parts(engine):
    engine.wake_up(tags=["weights"])
    engine.wake_up(tags=["kv_cache"])


@two_gpus
@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen2_moe"])
def test_tensor_parallel_alone(checkpoint, architecture):
    """Every rank sees every row: were logits of one a bit off, counters would not be the same."""
    folder = checkpoint(architecture)
    stock, found = tokens_of(folder, POLICIES, tensor_parallel_size=2)
    for name in ("S=K", "observe", "off"):
        assert found[name][0] == stock, name
    assert found["S=1"][0] != stock
    key = sere_key(folder, min_primary_experts=0)
    with running_engine(folder, key, tensor_parallel_size=2, **GRAPHS) as engine:
        for changes in ({}, {"select_top_k": 2, "threshold": 0.5}):
            set_policy(engine, Policy.parse({**key, **changes}))
            calls_of(engine).counters(reset=True)
            generate(engine, prompts(), tokens=100)
            first, second = calls_of(engine).counters(reset=True)
            assert first == second
            assert sum(first["decode_only"]["slots_rerouted"]) > 0


@two_gpus
def test_pipeline_stages(checkpoint):
    folder = checkpoint("qwen3_moe")
    stock, found = tokens_of(folder, POLICIES, pipeline_parallel_size=2)
    for name in ("S=K", "observe", "off"):
        assert found[name][0] == stock, name
    answers, counts = found["S=1"]
    assert answers != stock
    for before, after in zip(counts["experts_before"], counts["experts_after"], strict=True):
        assert 0 < after < before
    same = found["S=K"][1]
    assert same["experts_after"] == same["experts_before"]


def stage_policy(worker):
    return find_state(worker.vllm_config).bound.model_dump()


@two_gpus
def test_stages_switch_together_and_check_their_own_layers(checkpoint, tmp_path):
    """Steps are in flight while the policy changes: every stage is told between the same two."""
    from vllm import SamplingParams

    folder, rng = checkpoint("qwen3_moe"), random.Random(1)
    key = sere_key(folder, min_primary_experts=0)
    with running_engine(folder, key, pipeline_parallel_size=2, **GRAPHS) as engine:
        core = engine.llm_engine
        sampling = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, detokenize=False)
        read_counters(engine, reset=True)
        for number, request in enumerate(prompts(12)):
            core.add_request(str(number), request, sampling)
        while core.has_unfinished_requests():
            core.step()
            if rng.random() < 0.3:
                size = rng.choice([1, 2, TOP_K])
                set_policy(engine, Policy.parse({**key, "select_top_k": size}))
                first, second = engine.collective_rpc(stage_policy)
                assert first == second
                assert first["select_top_k"] == size
        reports = calls_of(engine).counters(reset=True)
        for kind in ("decode_only", "mixed"):
            # Under S = K slots are counted in no layer: both halves saw the same steps and rows.
            first, second = (report[kind] for report in reports)
            for name in ("steps", "steps_counted", "rows", "decode_rows"):
                assert first[name] == second[name]
            assert not any(first["experts_before"][2:])
            assert not any(second["experts_before"][:2])
    other = random_artifact(folder)
    other.metadata.router_fingerprint[3] = other.metadata.router_fingerprint[0]
    other.save(tmp_path / "other.safetensors")
    options = {"pipeline_parallel_size": 2, **GRAPHS}
    key = sere_key(folder, similarity=str(tmp_path / "other.safetensors"))
    # vLLM's executor says only that a worker failed, as a bare Exception; the worker's log why.
    told = pytest.raises(Exception, match=r"initialization failed|router fingerprint")
    with told, running_engine(folder, key, **options):
        pass
