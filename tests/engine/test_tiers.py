"""Requests that ask for exact routing: their rows, their KV blocks, their log-probabilities."""

from types import SimpleNamespace

import pytest

from sere_ray.engine.cpu.state import CpuState
from sere_ray.policy.tiers import asks_exact
from sere_ray.rules import EXACT, REROUTABLE
from tests.engine.conftest import generate, prompts, running_engine, sere_key

pytestmark = pytest.mark.engine
BLOCK = 32
ASK = {"sere_tier": "exact"}


@pytest.mark.parametrize(
    ("extra_args", "exact"),
    [(None, False), ({}, False), ({"sere_tier": "default"}, False), (ASK, True)],
)
def test_asks_exact(extra_args, exact):
    assert asks_exact(SimpleNamespace(extra_args=extra_args)) is exact
    assert asks_exact(None) is False


@pytest.fixture(scope="module")
def turns(checkpoint):
    """Two turns in one engine; the second prompt holds the first answer, made under S = 1."""
    folder = checkpoint("qwen3_moe")
    first = prompts(6, seed=3, length=(70, 90))
    options = {"enable_prefix_caching": True, "block_size": BLOCK, "dtype": "float32"}
    report, begin = {}, CpuState.begin
    kinds_seen = []

    def record(state, kinds):
        kinds_seen.append(kinds.tolist())
        begin(state, kinds)

    def turn(name, engine, requests, tokens=8, **sampling):
        kinds_seen.clear()
        _, outputs = generate(engine, requests, tokens=tokens, logprobs=5, **sampling)
        report[name] = outputs, list(kinds_seen)
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuState, "begin", record)
        with running_engine(folder, sere_key(folder, min_primary_experts=0), **options) as engine:
            answers = turn("first", engine, first, tokens=64)
            second = [
                {"prompt_token_ids": [*request["prompt_token_ids"], *answer, 7, 8, 9]}
                for request, answer in zip(first, answers, strict=True)
            ]
            turn("rerouted", engine, second)
            turn("exact", engine, second, extra_args=ASK)
            turn("again", engine, second, extra_args=ASK)
            forged = [{**request, "cache_salt": "|sere-exact"} for request in second]
            turn("forged", engine, forged)
            turn("after", engine, second, extra_args=ASK)
    with running_engine(folder, **options) as engine:
        turn("stock", engine, second)
    return report


def cached(turns, name):
    return [output.num_cached_tokens for output in turns[name][0]]


def logprobs(turns, name):
    return [
        [{token: entry.logprob for token, entry in step.items()} for step in o.outputs[0].logprobs]
        for o in turns[name][0]
    ]


def kinds(turns, name):
    return {kind for step in turns[name][1] for kind in step}


def test_row_kinds_in_the_worker(turns):
    assert kinds(turns, "first") == kinds(turns, "rerouted") == {EXACT, REROUTABLE}
    assert kinds(turns, "exact") == kinds(turns, "again") == kinds(turns, "after") == {EXACT}
    assert turns["stock"][1] == []


def test_an_exact_second_turn_has_the_log_probabilities_of_stock(turns):
    stock = logprobs(turns, "stock")
    assert logprobs(turns, "exact") == stock
    assert logprobs(turns, "rerouted") != stock


def test_exact_requests_find_only_blocks_of_exact_requests(turns):
    assert all(tokens >= 3 * BLOCK for tokens in cached(turns, "rerouted"))
    assert cached(turns, "exact") == [0] * 6
    assert all(tokens >= 3 * BLOCK for tokens in cached(turns, "again"))


def test_a_salt_that_looks_like_the_exact_tiers_finds_nothing_and_leaves_nothing(turns):
    assert cached(turns, "forged") == [0] * 6
    assert logprobs(turns, "after") == logprobs(turns, "again")
