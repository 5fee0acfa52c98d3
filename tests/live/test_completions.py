"""The benchmarks' client against a deployment."""

import asyncio
import re

import aiohttp
import pytest

from sere_ray.bench.completions import complete
from tests.live.traffic import counted
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


@pytest.mark.parametrize("stream", [True, False])
def test_a_structured_answer_under_re_routing(live, stream):
    """S = 1 makes gibberish of the demo model's words; the grammar holds all the same."""
    before = live.sere("policy")["policy"]
    live.sere("policy", {"mode": "on", "select_top_k": 1, "min_primary_experts": 0})
    try:
        form = {"regex": "(yes|no) [0-9]{6} [a-z]{6}"}
        counts, reply = counted(
            live, lambda: ask(live, structured_outputs=form, max_tokens=64, stream=stream)
        )
    finally:
        live.sere("policy", {k: v for k, v in before.items() if k != "similarity"})
    assert re.fullmatch(form["regex"], reply.text), reply.text
    assert counts["slots_rerouted"] > 0
