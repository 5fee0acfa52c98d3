"""KV computed under one policy is never found under another."""

import pytest

from sere_ray.engine.control import set_policy
from sere_ray.policy.policy import Policy
from tests.engine.conftest import generate, prompts, running_engine, sere_key

pytestmark = pytest.mark.engine
BLOCK = 32


@pytest.fixture(scope="module")
def turns(checkpoint):
    """Two turns: the second prompt holds the first answer, made under S = 1, then exact."""
    from vllm import SamplingParams

    folder = checkpoint("qwen3_moe")
    first = prompts(6, seed=3, length=(70, 90))
    key = sere_key(folder, min_primary_experts=0)
    options = {"enable_prefix_caching": True, "block_size": BLOCK}
    with running_engine(folder, key, **options) as engine:
        answers, _ = generate(engine, first, tokens=64)
        second = [
            {"prompt_token_ids": [*request["prompt_token_ids"], *answer, 7, 8, 9]}
            for request, answer in zip(first, answers, strict=True)
        ]
        _, same_policy = generate(engine, second, tokens=8, logprobs=5)
        parameters = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=5)
        engine.enqueue(second, parameters, use_tqdm=False)
        set_policy(engine, Policy.parse({**key, "mode": "off"}))
        waited = engine.wait_for_completion(use_tqdm=False)
        engine.reset_prefix_cache()
        set_policy(engine, Policy.parse(key))
        generate(engine, first, tokens=64)
        set_policy(engine, Policy.parse({**key, "mode": "observe"}))
        _, exact = generate(engine, second, tokens=8, logprobs=5)
        set_policy(engine, Policy.parse({**key, "mode": "off"}))
        _, again = generate(engine, second, tokens=8, logprobs=5)
        set_policy(engine, Policy.parse(key))
        _, back = generate(engine, first, tokens=64)
    with running_engine(folder, **options) as engine:
        _, stock = generate(engine, second, tokens=8, logprobs=5)
    return {
        "same policy": same_policy,
        "waited": waited,
        "exact": exact,
        "again": again,
        "back": back,
        "stock": stock,
    }


def cached(outputs):
    return [output.num_cached_tokens for output in outputs]


def logprobs(outputs):
    return [
        [{token: entry.logprob for token, entry in step.items()} for step in o.outputs[0].logprobs]
        for o in outputs
    ]


def test_blocks_are_shared_under_one_policy(turns):
    # the prompt of turn one and most of its answer come from the cache
    assert all(tokens >= 3 * BLOCK for tokens in cached(turns["same policy"]))
    # `observe` and `off` both leave what stock would; a policy that comes back finds its own
    assert all(tokens >= 3 * BLOCK for tokens in cached(turns["again"]))
    assert all(tokens >= 2 * BLOCK for tokens in cached(turns["back"]))


@pytest.mark.parametrize("when", ["waited", "exact"])
def test_nothing_is_found_after_a_change_of_policy(turns, when):
    """Neither by requests that came after it nor by those that waited for their turn."""
    assert cached(turns[when]) == [0] * 6


@pytest.mark.parametrize("when", ["waited", "exact"])
def test_an_exact_second_turn_has_the_log_probabilities_of_stock(turns, when):
    assert logprobs(turns[when]) == logprobs(turns["stock"])
    assert logprobs(turns["same policy"]) != logprobs(turns["stock"])
