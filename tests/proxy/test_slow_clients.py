"""Requests that arrive slowly, at a server of uvicorn's with our limits."""

import asyncio
import json

import pytest
import uvicorn

from sere_ray.proxy.limits import Limits
from sere_ray.proxy.slow_clients import PROTOCOL, DropHeaders, TimedProtocol, limit_requests
from sere_ray.util.ports import free_port

LIMITS = Limits(header_s=0.4, body_s=0.4, idle_s=1, connections=16, unfinished_share=0.25)


async def app(scope, receive, send):
    """Reads the body, then says which headers came."""
    while (await receive()).get("more_body"):
        pass
    names = [name.decode() for name, _ in scope["headers"]]
    body = json.dumps(names).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def served(scenario, monkeypatch, limits=LIMITS):
    """Run ``await scenario(port)`` beside a server."""
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    monkeypatch.setattr(TimedProtocol, "limits", limits)
    monkeypatch.setattr(TimedProtocol, "unfinished", {})
    limit_requests(limits)
    assert uvicorn.config.HTTP_PROTOCOLS["auto"] == PROTOCOL

    async def run():
        port = free_port()
        config = uvicorn.Config(
            DropHeaders(app), port=port, log_config=None, lifespan="off", timeout_keep_alive=1
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            return await asyncio.wait_for(scenario(port), 20)
        finally:
            server.should_exit = True
            await serving

    return asyncio.run(run())


async def answer(port, *parts, pause=0.0):
    """Send parts, read to the end: ``(status, body, seconds)``."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    start = asyncio.get_running_loop().time()
    for part in parts:
        writer.write(part)
        await asyncio.sleep(pause)
    content = await reader.read()
    writer.close()
    head, _, body = content.partition(b"\r\n\r\n")
    return int(head.split()[1]), body, asyncio.get_running_loop().time() - start


GET = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize("half", [b"", b"GET / HTTP/1.1\r\nhost: a\r\n", POST, POST + b"ab"])
def test_a_half_sent_request_ends_with_408(monkeypatch, half):
    status, body, seconds = served(lambda port: answer(port, half), monkeypatch)
    assert status == 408
    assert json.loads(body)["error"]["code"] == "request_timeout"
    assert 0.3 < seconds < 3


def test_bytes_now_and_then_win_no_time(monkeypatch):
    parts = [POST, b"a", b"b"]
    status, *_ = served(lambda port: answer(port, *parts, pause=0.25), monkeypatch)
    assert status == 408


@pytest.mark.parametrize("parts", [(GET,), (POST, b"abcd"), (POST + b"ab", b"cd")])
def test_a_whole_request_is_answered(monkeypatch, parts):
    assert served(lambda port: answer(port, *parts, pause=0.1), monkeypatch)[0] == 200


def test_a_second_request_of_a_connection_has_its_own_time(monkeypatch):
    kept = GET.replace(b"connection: close\r\n", b"")

    async def scenario(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(kept)
            assert b"200" in await reader.readuntil(b"]")
            await asyncio.sleep(0.3)
        writer.write(b"GET /")
        return await reader.read()

    assert b"408" in served(scenario, monkeypatch)


def test_the_oldest_half_sent_request_makes_way(monkeypatch):
    limits = LIMITS.model_copy(update={"header_s": 30})

    async def scenario(port):
        half = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        status, *_ = await answer(port, GET)
        assert (await half[0][0].read()).startswith(b"HTTP/1.1 408"), "the oldest"
        assert len(TimedProtocol.unfinished) <= limits.max_unfinished
        for _, writer in half:
            writer.close()
        return status

    assert served(scenario, monkeypatch, limits) == 200


def test_headers_that_a_client_must_not_set(monkeypatch):
    mine = GET[:-2] + b"X-Request-Disconnect-Disabled: ?1\r\nx-kept: 1\r\n\r\n"
    _, body, _ = served(lambda port: answer(port, mine), monkeypatch)
    assert "x-kept" in json.loads(body)
    assert "x-request-disconnect-disabled" not in json.loads(body)
