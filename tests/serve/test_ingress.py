"""What becomes of a request when the last replica is gone; handles are stand-ins for Ray's."""

import asyncio
import traceback
from types import SimpleNamespace

import pytest

from sere_ray.serve.gateway import ingress
from sere_ray.serve.gateway.ingress import first_response, has_no_replica, until_loss
from sere_ray.serve.gateway.losses import loss_event
from sere_ray.serve.gateway.refusals import Refusal


def handle(replicas, pending=()):
    router = SimpleNamespace(
        curr_replicas=dict.fromkeys(replicas), _pending_requests_by_id=dict.fromkeys(pending)
    )
    return SimpleNamespace(_router=SimpleNamespace(request_router=router))


async def answer_after(seconds, closed):
    try:
        await asyncio.sleep(seconds)
        yield "first"
        yield "second"
    finally:
        closed.append(True)


@pytest.fixture(autouse=True)
def _check_often(monkeypatch):
    monkeypatch.setattr(ingress, "QUEUE_CHECK_SECONDS", 0.02)


def ask(handle, seconds=0.2):
    closed = []

    async def run():
        responses = answer_after(seconds, closed)
        first = await first_response(responses, handle)
        return [first, *[response async for response in responses]]

    try:
        return asyncio.run(asyncio.wait_for(run(), 5)), closed
    except Refusal as refusal:
        return refusal, closed


@pytest.mark.parametrize(("replicas", "pending"), [(["a"], []), (["a"], ["request"]), ([], [])])
def test_a_request_that_somebody_has_or_can_take_goes_on(replicas, pending):
    answers, closed = ask(handle(replicas, pending))
    assert answers == ["first", "second"]
    assert closed


def test_a_request_that_nobody_can_take_is_refused_at_once():
    refusal, closed = ask(handle([], ["request"]), seconds=60)
    assert (refusal.status, refusal.code) == (503, "no_engine")
    assert refusal.headers["retry-after"]
    assert closed, "the request goes on"


def test_refusals_do_not_hold_the_frames_of_earlier_ones():
    """An ingress without an engine refuses every request there is; each would stay in memory."""

    def frames():
        refusal, _ = ask(handle([], ["request"]), seconds=60)
        return len(traceback.extract_tb(refusal.__traceback__))

    assert frames() == frames() == frames()


def events_of(responses):
    """What a client of Ray's stream reads, after our part of it."""
    from ray.llm._internal.serve.core.ingress.utils import _openai_json_wrapper

    async def generator():
        for response in responses:
            yield response

    async def read():
        return [event async for event in until_loss(_openai_json_wrapper(generator()))]

    return asyncio.run(read())


def test_nothing_follows_the_event_of_a_loss():
    token = 'data: {"choices": []}\n\n'
    assert events_of([token, loss_event()]) == [token, loss_event()]
    assert events_of([token]) == [token, "data: [DONE]\n\n"]


def test_a_deployment_that_never_ran_is_no_lost_one():
    assert not has_no_replica(SimpleNamespace(_router=SimpleNamespace(request_router=None)))
    assert has_no_replica(handle([]))
    assert not has_no_replica(handle(["a"]))
