"""What OpenAI clients ask and mistake, with the `openai` package; refusals leave all as it was."""

import json

import openai
import pytest

from tests.serve.deployment import ADMIN, API_KEY, MODEL_ID, NO_TIER_KEY

pytestmark = pytest.mark.engine
PROBLEM = [{"role": "user", "content": "Work out 23 + 48 - 17."}]
GREEDY = {"model": MODEL_ID, "temperature": 0}


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=API_KEY, max_retries=0, timeout=60)


def test_a_streamed_chat_ends_with_its_usage(client):
    options = {**GREEDY, "messages": PROBLEM, "max_tokens": 24}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    counted, expected = chunks[-1].usage, whole.usage
    assert counted.prompt_tokens == expected.prompt_tokens
    assert counted.completion_tokens == expected.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_log_probabilities(client):
    chat = client.chat.completions.create(
        **GREEDY, messages=PROBLEM, max_tokens=6, logprobs=True, top_logprobs=2
    )
    tokens = chat.choices[0].logprobs.content
    assert len(tokens) == chat.usage.completion_tokens
    assert all(t.logprob == max(top.logprob for top in t.top_logprobs) <= 0 for t in tokens)
    text = client.completions.create(**GREEDY, prompt="1 + 1", max_tokens=4, logprobs=3)
    assert len(text.choices[0].logprobs.token_logprobs) == text.usage.completion_tokens
    assert all(text.choices[0].logprobs.top_logprobs)


def test_stop_and_several_answers(client):
    options = {**GREEDY, "messages": PROBLEM, "max_tokens": 64}
    whole = client.chat.completions.create(**options).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    cut = client.chat.completions.create(**options, stop=[stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    several = client.completions.create(model=MODEL_ID, prompt="1 + 1", max_tokens=4, n=2)
    assert [choice.index for choice in several.choices] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "other"}, openai.NotFoundError, "other"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": "many"}, openai.BadRequestError, "max_tokens"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"messages": "text"}, openai.BadRequestError, "messages"),
        (
            {"messages": [{"role": "user", "content": "a " * 999}]},
            openai.BadRequestError,
            "256",
        ),
        (
            {"extra_body": {"vllm_xargs": {"sere_tier": "best"}}},
            openai.UnprocessableEntityError,
            "default, exact",
        ),
        ({"messages": [{"role": "user", "content": "x" * 100_001}]}, openai.APIStatusError, "larg"),
    ],
)
def test_a_mistake_raises_the_clients_own_error(live, client, changes, error, words):
    before = live.sere("policy")
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{**GREEDY, "messages": PROBLEM, **changes})
    assert words in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert live.sere("policy") == before


@pytest.mark.parametrize(
    ("key", "headers", "error"),
    [
        ("sk-wrong", {}, openai.AuthenticationError),
        (ADMIN, {}, openai.AuthenticationError),
        (NO_TIER_KEY, {"x-sere-tier": "exact"}, openai.PermissionDeniedError),
    ],
)
def test_keys_and_tiers(live, key, headers, error):
    other = openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)
    with pytest.raises(error):
        other.completions.create(model=MODEL_ID, prompt="a", extra_headers=headers)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"select_top_k": 0}, "select_top_k = 0"),
        ({"select_top_k": 5}, "1..4 is allowed"),
        ({"select_top_k": True}, "select_top_k = True"),
        ({"select_top_k": 1.5}, "select_top_k = 1.5"),
        ({"select_top_k": [1]}, "select_top_k = [1]"),
        ({"threshold": -0.1}, "threshold = -0.1"),
        (b'{"threshold": NaN}', "threshold = nan"),
        ({"mode": True}, "mode = True"),
        ({"mode": {}}, "mode = {}"),
        ({"union": "all"}, "union = 'all'"),
        ({"min_primary_experts": -1}, "min_primary_experts = -1"),
        ({"levels": []}, "unknown key"),
        ({"dispatch": "all_to_all"}, "when an engine starts"),
    ],
)
def test_a_policy_that_is_not_valid_changes_nothing(live, body, words):
    before = live.sere("policy")
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer, _ = live.request("PUT", "/sere/policy", data, ADMIN)
    assert status == 422, answer
    assert words in answer["error"]["message"]
    assert live.sere("policy") == before
    refused = live.sere("audit")["entries"][-1]
    assert (refused["who"], words in refused["refused"]) == ("ops", True)
