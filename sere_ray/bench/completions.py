"""Completions over HTTP as a client sees them: when the first token came, and how it ended."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Reply:
    """One request, from its first byte to its last."""

    status: int
    text: str
    """The answer, or whatever came in its place."""
    error: str | None
    """Code of an error in OpenAI's form, in the body or as the last event of a stream."""
    complete: bool
    """Whether the answer ended as it should: nothing is missing."""
    retry_after: bool
    """Whether the answer has the header ``Retry-After``."""
    first_token_s: float | None
    """Seconds to the first event of a stream; None for other answers."""
    seconds: float
    """From the sending of the request to the last byte."""


async def complete(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], headers: Mapping[str, str]
) -> Reply:
    """Send one completion and read all of its answer.

    Raises:
        aiohttp.ClientError: the connection broke.
    """
    start = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
        if not (body.get("stream") and response.status == 200):
            text, error, finished = _read(await response.text())
            first = None
        else:
            text, error, finished, first = await _read_stream(response, start)
        return Reply(
            status=response.status,
            text=text,
            error=error,
            complete=finished,
            retry_after="retry-after" in response.headers,
            first_token_s=first,
            seconds=time.perf_counter() - start,
        )


def _read(text: str) -> tuple[str, str | None, bool]:
    """Text, error code, and whether it is a whole answer."""
    try:
        document = json.loads(text)
        if "error" in document:
            return text, str(document["error"]["code"]), False
        return document["choices"][0]["text"], None, True
    except (ValueError, KeyError, TypeError, IndexError):
        return text, None, False


async def _read_stream(
    response: aiohttp.ClientResponse, start: float
) -> tuple[str, str | None, bool, float | None]:
    """Text, error code, whether it is a whole answer, and seconds from ``start`` to the first
    event."""
    pieces: list[str] = []
    first, error, finished = None, None, False
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if first is None:
            first = time.perf_counter() - start
        if line.startswith(b"data: [DONE]"):
            finished = True
            continue
        text, error, _ = _read(line[6:].decode())
        pieces.append(text)
    return "".join(pieces), error, finished and error is None, first
