"""Scores of answers through HTTP, over two ranks: nothing of them reaches a client."""

import json
import time

import pytest

from tests.live.traffic import at_once
from tests.serve.deployment import API_KEY, EXACT_KEY, MODEL_ID, UNSCORED_KEY, wait_for

pytestmark = pytest.mark.engine


def outcomes(live):
    return live.sere("stats")["total"]["scores"]["outcomes"]


def scored(live):
    return outcomes(live)["scored"]


def test_answers_of_all_routes_are_scored_and_look_as_ever(live):
    version, before = live.sere("policy")["version"], scored(live)
    status, chat, _ = live.request(
        "POST",
        "/v1/chat/completions",
        {
            "model": MODEL_ID,
            "messages": [{"role": "user", "content": "Once"}],
            "max_tokens": 24,
            "ignore_eos": True,
        },
        API_KEY,
    )
    assert status == 200
    assert chat["choices"][0]["logprobs"] is None
    status, stream, _ = live.complete(max_tokens=24, stream=True)
    assert status == 200
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert events.pop() == "[DONE]"
    assert not any(c["logprobs"] for e in events for c in json.loads(e)["choices"])
    status, own, _ = live.complete(max_tokens=24, logprobs=3)
    assert status == 200
    assert len(own["choices"][0]["logprobs"]["token_logprobs"]) == 24, "a client gets its own"
    assert live.complete(key=EXACT_KEY, max_tokens=24)[0] == 200
    assert all(answer[0] == 200 for answer in at_once(live, 8, max_tokens=48))
    wait_for(lambda: scored(live) >= before + 12, 20, "all scores")
    found = {s["tier"]: s for s in live.sere("stats")["scores"] if s["version"] == version}
    assert abs(found["exact"]["nats"]) < 1e-3
    assert found["exact"]["agreement"] > 0.99
    assert found["default"]["nats"] > 2e-3, "eight rows at S = 1 with a random artifact"


def test_several_answers_at_once_are_not_scored_but_counted(live):
    before = outcomes(live)["unsupported"]
    status, answer, _ = live.complete(n=2, temperature=1)
    assert status == 200
    assert len(answer["choices"]) == 2
    wait_for(lambda: outcomes(live)["unsupported"] == before + 1, 10, "the count")


def test_a_key_that_forbids_it_is_never_sampled(live):
    def total():
        return sum(outcomes(live).values())

    last = -1
    while last != (last := total()):  # those of other tests have ended
        time.sleep(0.5)
    assert all(answer[0] == 200 for answer in at_once(live, 4, key=UNSCORED_KEY))
    time.sleep(1)
    assert total() == last
