"""A hang-up as Ray's direct ingress tells of it, to a route of vLLM."""

import asyncio

import pytest
from starlette.requests import Request

from sere_ray.serve.gateway import hang_ups
from sere_ray.serve.gateway.hang_ups import HangUpLayer

HTTP = {"type": "http", "method": "POST", "path": "/", "headers": []}
DISCONNECT = {"type": "http.disconnect"}


class Server:
    """One route of vLLM's kind, whose work ends when it is cancelled or ``finish`` is set."""

    def __init__(self):
        self.started, self.finish = asyncio.Event(), asyncio.Event()
        self.is_freed = False

    async def __call__(self, scope, receive, send):
        from vllm.entrypoints.serve.utils.api_utils import with_cancellation

        request = Request({**scope, "app": type("App", (), {"state": object()})()}, receive)
        await with_cancellation(self.work)(None, request)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def work(self, body, raw_request):
        self.started.set()
        try:
            await self.finish.wait()
        except asyncio.CancelledError:
            self.is_freed = True
            raise


async def hang_up(app, server, sent):
    """Message and cancellation at once, as ``ray.serve._private.replica`` does it."""
    messages = asyncio.Queue()

    async def send(message):
        sent.append(message)

    task = asyncio.create_task(app(HTTP, messages.get, send))
    await server.started.wait()
    await asyncio.sleep(0.01)
    messages.put_nowait(DISCONNECT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.01)


def test_a_hang_up_ends_the_work():
    async def run():
        server, sent = Server(), []
        await hang_up(HangUpLayer(server), server, sent)
        assert server.is_freed
        assert sent == []

    asyncio.run(run())


def test_without_the_layer_the_work_goes_on():
    """When it no longer does, the layer can go."""

    async def run():
        server = Server()
        await hang_up(server, server, [])
        assert not server.is_freed

    asyncio.run(run())


def test_a_server_that_does_not_act_is_cancelled(monkeypatch):
    monkeypatch.setattr(hang_ups, "GRACE_SECONDS", 0.05)

    async def run():
        ended, started = asyncio.Event(), asyncio.Event()

        async def deaf(scope, receive, send):
            started.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        task = asyncio.create_task(HangUpLayer(deaf)(HTTP, None, None))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(run())


def test_answers_and_errors_pass():
    async def run():
        sent = []

        async def server(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise RuntimeError("broken")

        async def send(message):
            sent.append(message)

        with pytest.raises(RuntimeError, match="broken"):
            await HangUpLayer(server)(HTTP, None, send)
        assert sent[0]["status"] == 200

    asyncio.run(run())
