"""Limits on a body and on a whole answer, around a server of vLLM's kind."""

import asyncio
import json
import time

import pytest

from sere_ray.proxy.limits import Limits
from sere_ray.serve.gateway.hang_ups import HangUpLayer
from sere_ray.serve.gateway.refusals import Refusal
from sere_ray.serve.gateway.time_limits import TimeLimitLayer
from tests.serve.test_hang_ups import HTTP, Server


def run(app, *, messages=(), **limits):
    """Serve one request whose client sends these messages, then nothing: what it was sent."""
    sent = []

    async def scenario():
        waiting = list(messages)

        async def receive():
            if waiting:
                return waiting.pop(0)
            await asyncio.sleep(60)

        async def send(message):
            sent.append(message)

        layer = TimeLimitLayer(app, limits=Limits(**limits))
        await asyncio.wait_for(layer(HTTP, receive, send), 20)

    asyncio.run(scenario())
    return sent


def error(message):
    return json.loads(message["body"].removeprefix(b"data: "))["error"]


def test_an_answer_out_of_time_ends_in_the_engine_and_as_408():
    """Within a second: nobody waits for `GRACE_SECONDS`."""
    import vllm.entrypoints.serve.utils.api_utils  # noqa: F401 - takes longer than the limit

    server, start = Server(), time.monotonic()
    first, last = run(HangUpLayer(server), answer_s=0.2)
    assert time.monotonic() - start < 1.2
    assert server.is_freed
    assert first["status"] == 408
    assert dict(first["headers"])[b"x-should-retry"] == b"false"
    assert error(last)["code"] == "answer_timeout"
    assert "limits.answer_s" in error(last)["message"]


def stream(kind):
    async def app(scope, receive, send):
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            await asyncio.sleep(0.05)

    return app


def test_a_stream_out_of_time_ends_with_an_error_event():
    *events, last = run(stream(b"text/event-stream; charset=utf-8"), answer_s=0.2)
    assert len(events) > 2
    assert error(last)["code"] == "answer_timeout"
    assert not last["more_body"]


def test_what_is_no_stream_of_events_is_only_ended():
    assert run(stream(b"application/octet-stream"), answer_s=0.2)[-1]["body"] == b""


@pytest.mark.parametrize("answer_s", [None, 5.0])
def test_an_answer_in_time_is_as_it_was(answer_s):
    async def app(scope, receive, send):
        assert (await receive())["body"] == b"{}"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"[]"})

    whole = {"type": "http.request", "body": b"{}", "more_body": False}
    assert [m.get("body") for m in run(app, messages=[whole], answer_s=answer_s)] == [None, b"[]"]


@pytest.mark.parametrize("answer_s", [None, 5.0])
def test_a_late_body_is_refused(answer_s):
    part = {"type": "http.request", "body": b"{", "more_body": True}
    seen = []

    async def app(scope, receive, send):
        try:
            while True:
                seen.append(await receive())
        except Refusal as refusal:
            await refusal.answer(send)

    first, last = run(app, messages=[part], body_s=0.2, answer_s=answer_s)
    assert seen == [part]
    assert first["status"] == 408
    assert error(last)["code"] == "request_timeout"


@pytest.mark.parametrize("answer_s", [None, 5.0])
def test_a_cancellation_passes(answer_s):
    """Ray's own limit, and a hang-up: the work ends as well."""

    async def scenario():
        server = Server()

        async def receive():
            await asyncio.sleep(60)

        app = TimeLimitLayer(HangUpLayer(server), limits=Limits(answer_s=answer_s))
        task = asyncio.create_task(app(HTTP, receive, None))
        await server.started.wait()
        start = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert server.is_freed
        assert time.monotonic() - start < 1

    asyncio.run(scenario())
