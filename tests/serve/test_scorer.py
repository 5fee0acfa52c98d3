"""Scores of answers: one real engine of the demo model, re-routed at S = 1, and its exact model."""

import asyncio
import math
from types import SimpleNamespace

import pytest

from sere_ray import assets
from sere_ray.engine.vllm_internals import compute_in_engine_process
from sere_ray.serve.replica.scorer import ScoreConfig, Scorer, unscorable_engine
from sere_ray.serve.replica.served import Served
from tests.engine.conftest import random_artifact

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
PROMPTS = [[(7 * i + j) % 500 + 20 for j in range(12)] for i in range(6)]
EXACT = {"sere_tier": "exact"}
NEVER = {"sere_score": "never"}
TOKENS = 24


def start(similarity):
    """An engine in a process of its own, as a replica has it."""
    from vllm import AsyncEngineArgs, AsyncLLMEngine

    key = {"similarity": str(similarity), "select_top_k": 1, "min_primary_experts": 0}
    config = AsyncEngineArgs(
        model=str(assets.MODEL),
        max_model_len=128,
        max_num_seqs=16,
        enforce_eager=True,
        block_size=32,
        dtype="float32",
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=1 << 26,
        additional_config={"sere": key},
    ).create_engine_config()
    compute_in_engine_process(config)
    return AsyncLLMEngine.from_vllm_config(config)


class Bench:
    """The engine, asked by clients; a scorer at a time is in between."""

    def __init__(self, engine):
        from sere_ray.engine.engine_load import watch_load

        self.engine, self.load, self.version, self.count = engine, watch_load(engine), 3, 0

    async def ask(self, prompt, stream=True, **sampling):
        """``(outputs, token ids, log-probabilities)`` of a request, as its client sees them."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        keys = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **sampling}
        params = SamplingParams(output_kind=kind, **keys)
        self.count += 1
        asked = {"type": "token", "prompt_token_ids": prompt}
        answers = self.engine.generate(asked, params, f"r{self.count}")
        outputs = [output async for output in answers]
        ids = [token for o in outputs for token in o.outputs[0].token_ids]
        steps = [step for o in outputs for step in o.outputs[0].logprobs or ()]
        return outputs, ids, steps

    async def scored(self, requests, *, counts=None, first=None, has_room=None, share=1, **config):
        """Scores, when all of these requests (coroutines) are served and so many are counted.

        ``first`` is called with the scorer.
        """
        scorer = Scorer(
            self.engine,
            ScoreConfig(share=share, **config),
            has_room=has_room or (lambda: self.load.has_room),
            version=lambda: self.version,
        )
        if first is not None:
            first(scorer)
        answers = await asyncio.gather(*requests)
        counts = len(requests) if counts is None else counts
        async with asyncio.timeout(60):
            while sum(scorer.scores.report()["outcomes"].values()) < counts:
                await asyncio.sleep(0.02)
        scorer.close()
        return SimpleNamespace(**scorer.scores.report(), answers=answers)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What happened, by the name of each scene."""
    similarity = tmp_path_factory.mktemp("scorer") / "a.safetensors"
    random_artifact(assets.MODEL).save(similarity)

    async def scenes():
        bench = Bench(start(similarity))
        try:
            return await play(bench)
        finally:
            bench.engine.shutdown()

    return asyncio.run(scenes())


async def play(bench):
    from vllm.sampling_params import StructuredOutputsParams

    ask, score = bench.ask, bench.scored
    scenes = {}
    # Of the exact tier: a re-routed answer depends on who is in its steps.
    exact = [{"prompt": p, "extra_args": EXACT} for p in PROMPTS]
    scenes["none"] = await score([ask(**request) for request in exact], share=0, counts=0)
    scenes["all"] = await score([ask(**request) for request in exact])
    scenes["greedy"] = await score([ask(p) for p in PROMPTS])
    scenes["whole"] = await score([ask(p, stream=False, temperature=1.0) for p in PROMPTS])
    scenes["exact"] = await score([ask(p, extra_args=EXACT, temperature=1.0) for p in PROMPTS])
    digits = StructuredOutputsParams(regex="[0-9]{8,12}")
    scenes["structured"] = await score([ask(PROMPTS[0], structured_outputs=digits)])
    scenes["own"] = own = await score([ask(PROMPTS[0], logprobs=2)])
    text = PROMPTS[0] + own.answers[0][1]
    scenes["by hand"] = await ask(text, extra_args=EXACT, prompt_logprobs=1, max_tokens=1)
    scenes["found"] = await ask(text, extra_args=EXACT, max_tokens=1)
    scenes["unsupported"] = await score(
        [ask(PROMPTS[0], n=2, temperature=1), ask(PROMPTS[0], logprobs=0)]
    )
    scenes["short"] = await score([ask(PROMPTS[0], max_tokens=1)])
    scenes["long"] = await score([ask(PROMPTS[0])], max_tokens=13)
    scenes["cut"] = await score([ask(PROMPTS[0])], max_tokens=20)
    scenes["forbidden"] = await score([ask(PROMPTS[0], extra_args=NEVER)], counts=0)
    scenes["full"] = await score(
        [ask(p) for p in PROMPTS], has_room=lambda: False, wait_s=0.3, queue=1
    )
    scenes["late"] = await score([ask(PROMPTS[0])], timeout_s=1e-6)
    scenes["changed"] = await score([change_meanwhile(bench)])
    scenes["broken"] = await score([ask(PROMPTS[0])], counts=2, first=queue_up_impossible)
    scenes["hung up"] = await hung_up(bench)
    return scenes


async def change_meanwhile(bench):
    asked = asyncio.create_task(bench.ask(PROMPTS[0]))
    await asyncio.sleep(0.02)
    bench.version += 1
    return await asked


def queue_up_impossible(scorer):
    """An answer of tokens that the model does not have: its pass is refused by the engine."""
    served = Served(SimpleNamespace(extra_args=None), version=4)
    served.prompt, served.answer, served._steps = [1], [10**6, 10**6], [{}, {}]
    served.is_finished = True
    scorer._queue_up(served, True)


async def hung_up(bench):
    """A client goes away after its first token."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    async def leave():
        sampling = SamplingParams(max_tokens=100, output_kind=RequestOutputKind.DELTA)
        prompt = {"type": "token", "prompt_token_ids": PROMPTS[0]}
        answers = bench.engine.generate(prompt, sampling, "leaves")
        await anext(answers)
        await answers.aclose()
        return len(bench.engine.output_processor.request_states)

    return await bench.scored([leave()])


def nats(scene, tier="default"):
    sums = scene.tiers[tier]
    return (sums["exact_nats"] - sums["served_nats"]) / sums["tokens"]


def outcomes(scene):
    return {name: count for name, count in scene.outcomes.items() if count}


def test_a_client_sees_nothing_of_it(seen):
    for plain, sampled in zip(seen["none"].answers, seen["all"].answers, strict=True):
        assert sampled[1] == plain[1], "other tokens"
        # How many pieces a stream has depends on how quickly its client takes them.
        assert len(sampled[0]) > 1, "not streamed"
        for output in sampled[0]:
            assert output.outputs[0].logprobs is None
            assert output.outputs[0].cumulative_logprob is None
    assert outcomes(seen["none"]) == {}
    assert outcomes(seen["all"]) == {"scored": 6}


@pytest.mark.parametrize("name", ["greedy", "whole"])
def test_rerouted_answers_are_less_likely_to_the_exact_model(seen, name):
    scene = seen[name]
    assert outcomes(scene) == {"scored": 6}
    assert scene.tiers["default"]["tokens"] == 6 * (TOKENS - 1), "without each answer's first"
    assert nats(scene) > 0.05
    assert scene.tiers["default"]["agreed"] < 6 * (TOKENS - 1)
    assert [(v["version"], v["tier"]) for v in scene.versions] == [(3, "default")]


def test_exact_requests_score_zero(seen):
    """The check of the check: in float32 on one machine the noise is that of other batch shapes."""
    scene = seen["exact"]
    assert scene.tiers["exact"]["answers"] == 6
    assert abs(nats(scene, "exact")) < 1e-4
    assert scene.tiers["exact"]["agreed"] == scene.tiers["exact"]["tokens"]
    assert scene.tiers["default"]["answers"] == 0


def test_a_structured_answer_is_scored_by_the_models_own_logits(seen):
    """A grammar leaves few tokens, whose share of its own mass is no part of the score."""
    scene = seen["structured"]
    assert outcomes(scene) == {"scored": 1}
    assert scene.tiers["default"]["served_nats"] > scene.tiers["default"]["tokens"], "of raw logits"


def test_the_sums_are_those_of_the_clients_own_log_probabilities(seen):
    scene = seen["own"]
    (_, ids, steps) = scene.answers[0]
    assert all(len(step) >= 2 for step in steps), "a client that asks for them gets its own"
    (outputs, _, _) = seen["by hand"]
    exact = outputs[0].prompt_logprobs[len(PROMPTS[0]) :]
    sums = scene.tiers["default"]

    def total(entries):
        return -math.fsum(e[t].logprob for e, t in list(zip(entries, ids, strict=True))[1:])

    assert sums["served_nats"] == pytest.approx(total(steps), abs=1e-5)
    assert sums["exact_nats"] == pytest.approx(total(exact), abs=1e-3)


def test_nobody_finds_the_blocks_of_a_pass(seen):
    (outputs, _, _) = seen["by hand"]  # the first exact request for the text that was scored
    assert outputs[0].num_cached_tokens == 0
    (outputs, _, _) = seen["found"]
    assert outputs[0].num_cached_tokens > 0, "or nothing would be found in any case"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unsupported", {"unsupported": 2}),
        ("short", {"too_short": 1}),
        ("long", {"too_long": 1}),
        ("forbidden", {}),
        ("full", {"no_room": 6}),
        ("late", {"timed_out": 1}),
        ("changed", {"policy_changed": 1}),
        ("broken", {"failed": 1, "scored": 1}),
        ("hung up", {"unfinished": 1}),
    ],
)
def test_what_is_not_scored_is_counted(seen, name, expected):
    assert outcomes(seen[name]) == expected


def test_answers_are_whole_whatever_becomes_of_their_score(seen):
    for name in ("full", "late", "changed", "long"):
        for answer in seen[name].answers:
            assert len(answer[1]) == TOKENS, name
    (outputs, _, _), (_, _, steps) = seen["unsupported"].answers
    assert {c.index for o in outputs for c in o.outputs} == {0, 1}
    assert len(steps) == TOKENS, "the client's own log-probabilities"
    assert seen["hung up"].answers == [0], "the request of a client that hung up goes on"


def test_a_long_answer_is_scored_as_far_as_the_limit(seen):
    assert outcomes(seen["cut"]) == {"scored": 1}
    assert seen["cut"].tiers["default"]["tokens"] == 20 - len(PROMPTS[0]) - 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({}, None),
        ({"max_logprobs": -1}, None),
        ({"disable_log_stats": True}, "disable_log_stats"),
        ({"logprobs_mode": "processed_logprobs"}, "raw_logprobs"),
        ({"max_logprobs": 0}, "max_logprobs"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
    ],
)
def test_engines_that_cannot_be_scored(arguments, word):
    reason = unscorable_engine(arguments)
    assert (reason is None) == (word is None)
    assert word is None or word in reason
