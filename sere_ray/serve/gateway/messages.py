"""ASGI's messages: a request's body, read whole and handed on changed; what kind an answer is."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from sere_ray.serve.gateway.refusals import Message, Receive, Refusal

METHODS_WITH_BODY = ("POST", "PUT", "PATCH")
"""Methods of requests whose body is read."""
MOST_DIGITS = 18
"""Of a length that is read as a number: Python refuses to read very long ones."""


async def read_body(receive: Receive, headers: Mapping[str, str], limit: int) -> bytes:
    """The whole of it.

    Raises:
        Refusal: larger than ``limit`` bytes, or the client went away.
    """
    too_large = Refusal(413, "body_too_large", f"The body is larger than {limit} bytes.")
    length = headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > MOST_DIGITS or int(length) > limit):
        raise too_large
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "disconnected", "The client went away.")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise too_large
        more = message.get("more_body", False)
    return b"".join(parts)


def replayed(content: bytes, receive: Receive) -> Receive:
    """Hand the body over once; afterwards the client's messages (a disconnect) come through."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    return replay


def with_body(scope: MutableMapping[str, Any], content: bytes) -> MutableMapping[str, Any]:
    """The scope of a request whose body has become ``content``."""
    replaced = (b"content-length", b"transfer-encoding")
    headers = [(k, v) for k, v in scope["headers"] if k.lower() not in replaced]
    return {**scope, "headers": [*headers, (b"content-length", str(len(content)).encode())]}


def begins_stream(message: Message) -> bool:
    """Whether the first message of an answer says that events follow."""
    headers = dict(message.get("headers") or ())
    return bool(headers.get(b"content-type", b"").startswith(b"text/event-stream"))
