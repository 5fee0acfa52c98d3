"""KV computed under one policy is never found under another."""

import pytest

from sere_ray.config import Policy
from sere_ray.engine.control import set_policy
from tests.engine.conftest import generate, prompts, running_engine, sere_key

pytestmark = pytest.mark.engine
BLOCK = 32


@pytest.fixture(scope="module")
def turns(checkpoint):
    """Two turns: the second prompt holds the first answer, made under S = 1, then exact."""
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
        set_policy(engine, Policy.parse({**key, "mode": "off"}))
        _, exact = generate(engine, second, tokens=8, logprobs=5)
        _, again = generate(engine, second, tokens=8, logprobs=5)
    with running_engine(folder, **options) as engine:
        _, stock = generate(engine, second, tokens=8, logprobs=5)
    return {"same policy": same_policy, "exact": exact, "again": again, "stock": stock}


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
    assert all(tokens >= 3 * BLOCK for tokens in cached(turns["again"]))


def test_nothing_is_found_after_a_change_of_policy(turns):
    assert cached(turns["exact"]) == [0] * 6


def test_an_exact_second_turn_has_the_log_probabilities_of_stock(turns):
    assert logprobs(turns["exact"]) == logprobs(turns["stock"])
    assert logprobs(turns["same policy"]) != logprobs(turns["stock"])
