"""The benchmarks' client against a deployment."""

import asyncio

import aiohttp
import pytest

from sere_ray.bench.completions import complete
from tests.serve.deployment import API_KEY, MODEL_ID

pytestmark = pytest.mark.engine


def ask(live, key=API_KEY, **options):
    async def send():
        async with aiohttp.ClientSession() as session:
            body = {"model": MODEL_ID, "prompt": "1 + 1", "max_tokens": 8, "temperature": 0}
            headers = {"Authorization": f"Bearer {key}"}
            return await complete(session, live.url, {**body, **options}, headers)

    return asyncio.run(send())


def test_a_stream_says_what_one_answer_says(live):
    whole, streamed = ask(live), ask(live, stream=True)
    assert whole.complete
    assert streamed.complete
    assert whole.text == streamed.text
    assert whole.first_token_s is None
    assert 0 < streamed.first_token_s < streamed.seconds


@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal(live, stream):
    reply = ask(live, "sk-wrong", stream=stream)
    assert (reply.status, reply.complete, reply.error) == (401, False, "invalid_api_key")
