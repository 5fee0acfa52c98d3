"""What clients of a lost engine read; the server is a stand-in for vLLM's, with its answers."""

import asyncio
import json
import subprocess
import sys

import pytest

from sere_ray.serve.gateway import losses
from sere_ray.serve.gateway.losses import LossLayer

HTTP = {"type": "http"}
FAILED = b'{"error": {"message": "EngineCore", "type": "InternalServerError", "code": 500}}'


def said_by(messages, *, lost, scope=HTTP):
    """What reaches the client of a server that sends ``messages``."""
    sent = []

    async def server(scope, receive, send):
        for message in messages:
            await send(message)

    async def send(message):
        sent.append(message)

    asyncio.run(LossLayer(server, is_lost=lambda: lost)(scope, None, send))
    return sent


def answer(status, *bodies):
    start = {"type": "http.response.start", "status": status, "headers": []}
    parts = [{"type": "http.response.body", "body": b, "more_body": True} for b in bodies]
    return [start, *parts, {"type": "http.response.body", "body": b""}]


def test_an_answer():
    start, body = said_by(answer(500, FAILED), lost=True)
    headers = dict(start["headers"])
    assert (start["status"], headers[b"retry-after"]) == (503, b"5")
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"content-length"] == str(len(body["body"])).encode()
    assert json.loads(body["body"])["error"]["code"] == "engine_lost"
    assert not body.get("more_body")


def test_a_stream_ends_with_the_event_and_says_nothing_after_it():
    token, done = b'data: {"choices": []}\n\n', b"data: [DONE]\n\n"
    start, first, last = said_by(answer(200, token, b"data: " + FAILED + b"\n\n", done), lost=True)
    assert start["status"] == 200
    assert first["body"] == token
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == "engine_lost"
    assert not last.get("more_body")


@pytest.mark.parametrize(
    ("messages", "lost"),
    [
        (answer(500, FAILED), False),
        (answer(200, b"data: " + FAILED + b"\n\n", b"data: [DONE]\n\n"), False),
        (answer(400, FAILED), True),  # a mistake is one whatever the engine does
        (answer(200, b'{"choices": []}'), True),
        (answer(200, b'data: {"choices": [{"text": "data: {\\"error\\""}]}\n\n'), True),
    ],
)
def test_everything_else_passes(messages, lost):
    assert said_by(messages, lost=lost) == messages


def test_only_requests_are_looked_at():
    messages = [{"type": "lifespan.startup.complete"}]
    assert said_by(messages, lost=True, scope={"type": "lifespan"}) == messages


@pytest.mark.parametrize(
    ("lost", "status", "code"), [(True, 503, "engine_lost"), (False, 500, 500)]
)
def test_what_nobody_has_foreseen_tells_nothing_of_the_server(lost, status, code):
    sent = []

    async def server(scope, receive, send):
        raise RuntimeError("at /srv/secret.py")

    async def send(message):
        sent.append(message)

    asyncio.run(LossLayer(server, is_lost=lambda: lost)({**HTTP, "path": "/"}, None, send))
    start, body = sent
    assert start["status"] == status
    assert json.loads(body["body"])["error"]["code"] == code
    assert b"secret" not in body["body"]


def test_the_controller_reads_a_loss_without_vllm():
    """It gets the exception of a failed health check."""
    check = f"import sys, {losses.__name__}; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
