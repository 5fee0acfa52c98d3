"""From the ingress to vLLM's application in a replica and back; handles are stand-ins for Ray's."""

import asyncio
import traceback
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from sere_ray.proxy.limits import Limits
from sere_ray.serve.gateway import forward
from sere_ray.serve.gateway.forward import Forwarder, answers, has_no_replica
from sere_ray.serve.gateway.losses import lost
from sere_ray.serve.gateway.refusals import Refusal
from sere_ray.serve.gateway.time_limits import AnswerClock, TimeLimitLayer

SCOPE = {"type": "http", "method": "POST", "path": "/v1/a", "headers": [(b"a", b"b")], "state": {}}
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


def handle(replicas, pending=(), serve_http=None):
    router = SimpleNamespace(
        curr_replicas=dict.fromkeys(replicas), _pending_requests_by_id=dict.fromkeys(pending)
    )
    made = SimpleNamespace(
        _router=SimpleNamespace(request_router=router),
        serve_http=SimpleNamespace(remote=serve_http),
    )
    made.options = lambda stream: made
    return made


class Call:
    """What ``remote`` returns: an iterator that can be cancelled."""

    def __init__(self, generator):
        self._generator, self.is_cancelled = generator, False

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await self._generator.__anext__()

    def cancel(self):
        self.is_cancelled = True


async def answer_after(seconds, closed):
    try:
        await asyncio.sleep(seconds)
        yield "first"
        yield "second"
    finally:
        closed.append(True)


@pytest.fixture(autouse=True)
def _check_often(monkeypatch):
    monkeypatch.setattr(forward, "QUEUE_CHECK_SECONDS", 0.02)


def forwarder(replicas, wait=0.0, places=9):
    return Forwarder(replicas, Limits(queue_while_restarting_s=wait, max_queued=places))


def ask(handle, seconds=0.2):
    closed = []

    async def run():
        responses = answer_after(seconds, closed)
        first = await forwarder(handle)._first_response(responses, 0.0, AnswerClock())
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


def test_a_request_that_nobody_can_take_is_refused():
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


def test_a_deployment_that_never_ran_is_no_lost_one():
    assert not has_no_replica(SimpleNamespace(_router=SimpleNamespace(request_router=None)))
    assert has_no_replica(handle([]))
    assert not has_no_replica(handle(["a"]))


# --- the ingress ---------------------------------------------------------------------------------


def start(headers=()):
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def part(body, more=True):
    return {"type": "http.response.body", "body": body, "more_body": more}


def forwarded(batches, error=None, scope=SCOPE):
    """``(what the client reads, what the replica got, whether the call was cancelled)``."""
    sent, calls, got = [], [], []

    async def replica():
        for batch in batches:
            yield batch
        if error is not None:
            raise error

    def remote(request, body):
        got.append((request, body))
        calls.append(Call(replica()))
        return calls[0]

    parts = [
        {"type": "http.request", "body": b"on", "more_body": True},
        {"type": "http.request", "body": b"e", "more_body": False},
    ]

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(forwarder(handle(["a"], serve_http=remote))(scope, receive, send))
    return sent, got[0], calls[0].is_cancelled


def test_a_request_goes_as_it_came_and_the_answer_comes_back():
    batches = [[start(), part(b"a")], [part(b"b", more=False)]]
    sent, (request, body), is_cancelled = forwarded(batches)
    assert sent == [message for batch in batches for message in batch]
    assert body == b"one"
    assert request == {name: SCOPE[name] for name in ("type", "method", "path", "headers")}
    assert not is_cancelled, "that would be one more message to the replica"


def test_a_request_without_a_body_waits_for_none():
    _, (_, body), _ = forwarded(
        [[start(), part(b"", more=False)]], scope={**SCOPE, "method": "GET"}
    )
    assert body == b""


def test_a_stream_whose_replica_dies_ends_with_an_event():
    sent, _, _ = forwarded([[start(STREAM), part(b"data: a\n\n")]], RayActorError())
    assert sent[-1] == {"type": "http.response.body", "body": lost().event()}


def test_an_answer_whose_replica_dies_is_refused_or_cut():
    for batches in ([], [[start()]], [[start(STREAM)]]):
        with pytest.raises(Refusal, match="send the request again"):
            forwarded(batches, RayActorError())
    with pytest.raises(RayActorError):  # its length was told: the connection must break
        forwarded([[start([(b"content-length", b"9")]), part(b"a")]], RayActorError())


def test_a_replica_that_dies_after_its_answer_harms_nobody():
    """An error here would close the connection, on which the client's next request may be."""
    batches = [[start(), part(b"a", more=False)]]
    assert forwarded(batches, RayActorError())[0] == batches[0]


def test_a_client_that_is_gone_ends_the_call():
    async def endless():
        yield [start(), part(b"a")]
        await asyncio.sleep(60)

    async def run():
        call = Call(endless())
        replicas = handle(["a"], serve_http=lambda request, body: call)

        async def send(message):
            client.cancel()

        client = asyncio.ensure_future(forwarder(replicas)({**SCOPE, "method": "GET"}, None, send))
        with pytest.raises(asyncio.CancelledError):
            await client
        return call.is_cancelled

    assert asyncio.run(asyncio.wait_for(run(), 5))


def test_another_error_is_none_of_a_loss():
    with pytest.raises(ValueError, match="a mistake"):
        forwarded([], ValueError("a mistake"))


def sent_while_restarting(requests, *, back_after=None, method="POST", takes=0.0, **limits):
    """Statuses of requests that find no replica, and the seconds until all had an answer."""
    replicas = handle([])

    async def replica():
        await asyncio.sleep(takes)
        yield [start(), part(b"a", more=False)]

    replicas.serve_http.remote = lambda request, body: Call(replica())

    async def run():
        room = TimeLimitLayer(forwarder(replicas, **limits), limits=Limits(answer_s=0.5))
        loop = asyncio.get_running_loop()
        if back_after is not None:
            router = replicas._router.request_router
            loop.call_later(back_after, lambda: router.curr_replicas.update(a=None))
        began = loop.time()
        statuses = await asyncio.gather(*(one(room) for _ in range(requests)))
        return sorted(statuses), loop.time() - began

    async def one(room):
        sent = []

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        try:
            await room({**SCOPE, "method": method}, receive, send)
        except Refusal as refusal:
            return refusal.status
        return sent[0]["status"]

    return asyncio.run(asyncio.wait_for(run(), 10))


def test_requests_wait_for_an_engine_that_restarts():
    statuses, seconds = sent_while_restarting(3, back_after=0.3, wait=5.0)
    assert statuses == [200, 200, 200]
    assert 0.3 <= seconds < 2


def test_an_answer_may_take_as_long_as_ever_after_such_a_wait():
    assert sent_while_restarting(1, back_after=0.8, wait=5.0, takes=0.2)[0] == [200]
    assert sent_while_restarting(1, back_after=0.2, wait=5.0, takes=3.0)[0] == [408]


def test_they_wait_so_long_and_so_many_and_no_longer_and_no_more():
    statuses, seconds = sent_while_restarting(3, wait=0.3)
    assert statuses == [503] * 3
    assert 0.3 <= seconds < 2
    statuses, _ = sent_while_restarting(5, back_after=0.3, wait=5.0, places=2)
    assert statuses == [200, 200, 503, 503, 503]


def test_an_answer_that_comes_while_a_request_waits_is_handed_on():
    async def run():
        closed = []
        responses = answer_after(0.2, closed)
        room = forwarder(handle([], ["another request"]))
        deadline = asyncio.get_running_loop().time() + 60
        first = room._first_response(responses, deadline, AnswerClock())
        return await asyncio.wait_for(first, 5)

    assert asyncio.run(run()) == "first"


def test_a_question_of_how_things_are_does_not_wait():
    statuses, seconds = sent_while_restarting(1, wait=5.0, method="GET")
    assert statuses == [503]
    assert seconds < 1


# --- the replica ---------------------------------------------------------------------------------


def test_what_an_application_says_at_once_goes_at_once():
    async def app(scope, receive, send):
        assert scope["path"] == "/v1/a"
        assert await receive() == {"type": "http.request", "body": b"one", "more_body": False}
        await send(start())
        await send(part(b"a"))
        await asyncio.sleep(0.01)
        await send(part(b"b", more=False))

    async def run():
        return [batch async for batch in answers(app, SCOPE, b"one")]

    assert asyncio.run(run()) == [[start(), part(b"a")], [part(b"b", more=False)]]


def test_an_application_hears_that_the_client_is_gone():
    heard = []

    async def app(scope, receive, send):
        await receive()
        await send(start())
        try:
            heard.append(await receive())
        except asyncio.CancelledError:
            heard.append("cancelled")
            raise

    async def run():
        batches = answers(app, SCOPE, b"")
        assert await anext(batches) == [start()]
        await batches.aclose()

    asyncio.run(run())
    assert heard


def test_an_application_that_fails_fails_here():
    async def app(scope, receive, send):
        await send(start())
        raise RuntimeError("broken")

    async def run():
        async for _ in answers(app, SCOPE, b""):
            pass

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(run())
