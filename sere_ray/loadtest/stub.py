"""A server whose tokens come at known times: the generator is checked against it.

It runs in a process of its own. Each event carries the time at which the stub wrote it, by the
clock that all processes of the machine share. So its times are true even when it is late.
"""

import asyncio
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@contextmanager
def stub(core: int | None) -> Iterator[str]:
    """Run the stub; yields its address.

    Args:
        core: to run on; None = any.

    A request to ``{address}/{rate}/v1/chat/completions`` is answered with ``max_tokens`` events,
    ``rate`` a second.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, core), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def written(text: str) -> tuple[float, list[float]]:
    """When the stub got a request, and when it wrote each token: from the text of its answer."""
    received, *tokens = (float(word) for word in text.split())
    return received, tokens


def _serve(pipe: Connection, core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    asyncio.run(_listen(pipe))


async def _listen(pipe: Connection) -> None:
    server = await asyncio.start_server(_answer_all, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            received = time.perf_counter()
            line, *headers = head.decode().split("\r\n")
            rate = float(line.split("/")[1])
            sizes = [int(h.split(":")[1]) for h in headers if h.startswith("Content-Length")]
            if not sizes:  # `vllm bench serve` looks for metrics
                writer.write(_NOT_FOUND)
                continue
            request = json.loads(await reader.readexactly(sizes[0]))
            count = request.get("max_completion_tokens") or request["max_tokens"]
            await _emit(writer, received, rate, count)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _emit(writer: asyncio.StreamWriter, received: float, rate: float, count: int) -> None:
    writer.write(_HEAD)
    for number in range(1, count + 1):
        await asyncio.sleep(received + number / rate - time.perf_counter())
        if writer.is_closing():
            raise ConnectionError("the client is gone")
        at = time.perf_counter()
        text = f"{received:.7f} {at:.7f} " if number == 1 else f"{at:.7f} "
        choice = f'{{"index":0,"delta":{{"content":"{text}"}},"finish_reason":null}}'
        writer.write(_chunk(f'{{"choices":[{choice}]}}'))
    writer.write(
        _chunk('{"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}')
        + _chunk(f'{{"choices":[],"usage":{{"completion_tokens":{count},"prompt_tokens":1}}}}')
        + _chunk("[DONE]")
        + b"0\r\n\r\n"
    )


def _chunk(data: str) -> bytes:
    event = f"data: {data}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(event), event)
