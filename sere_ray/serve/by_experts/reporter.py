"""A replica's part: which requests it has, what their texts are like, which experts they want.

The text is read where the request comes in (:class:`TextLayer`), the experts are read from the
engine once a second, without stopping it. Whatever goes wrong here leaves requests alone.
"""

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, MutableMapping
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import numpy as np

from sere_ray.engine.signatures import DIMENSIONS, Floats, of_workers
from sere_ray.engine.worker_calls import WorkerCalls
from sere_ray.serve.by_experts.kinds import Kinds
from sere_ray.serve.by_experts.placement import Likes
from sere_ray.serve.by_experts.report import KEY, Report
from sere_ray.serve.by_experts.text import text_of_body, text_vector
from sere_ray.serve.gateway.messages import replayed
from sere_ray.serve.gateway.refusals import App, Message, Receive, Send

logger = logging.getLogger("ray.serve")
PERIOD_SECONDS = 1.0
"""Between two readings of the engine, and between two reports to request routers."""
LEAST_ROWS = 4
"""Computed rows of a prompt below which its counts say little: most of it was in the cache."""
MOST_REQUESTS = 2048
"""Requests whose text is kept until the engine has counted their experts."""
BY_TEXT = "text"
"""The place of a model's word in reports whose signatures are texts' own vectors."""
SCORING = "sere-score-"
"""How the ids of the scorer's own passes begin: they are no client's."""
_TEXT: ContextVar[Floats | None] = ContextVar("sere_ray_text", default=None)
_ROUTES = ("/v1/completions", "/v1/chat/completions")
_CHILD = re.compile(r"^\d+_")


class TextLayer:
    """Pure ASGI middleware that notes what the text of a request is like, for the reporter."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request as it is."""
        is_asked = scope["type"] == "http" and scope["method"] == "POST"
        if not is_asked or not str(scope["path"]).endswith(_ROUTES):
            return await self._app(scope, receive, send)
        first = await receive()
        _TEXT.set(_text_of(first))
        await self._app(scope, _after(first, receive), send)


def _text_of(message: Message) -> Floats | None:
    """Of a body that came whole; the access layer hands on only those."""
    if message["type"] != "http.request" or message.get("more_body", False):
        return None
    try:
        text = text_of_body(message.get("body", b""))
        return None if text is None else text_vector(text)
    except Exception as error:
        logger.warning("sere-ray: the text of a request was not read (%s)", type(error).__name__)
        return None


def _after(first: Message, receive: Receive) -> Receive:
    if first["type"] == "http.request" and not first.get("more_body", False):
        return replayed(first.get("body", b""), receive)
    held: list[Message] = [first]

    async def replay() -> Message:
        return held.pop() if held else await receive()

    return replay


class Reporter:
    """Follows the requests of one engine.

    Args:
        client: vLLM's ``AsyncLLM``; its ``generate`` is wrapped from now on.
        calls: of the engine's workers.
        gang: id of the replica's gang.
    """

    def __init__(self, client: Any, calls: WorkerCalls[Awaitable[list[Any]]], gang: str) -> None:
        self._calls, self._gang = calls, gang
        self._kinds = Kinds()
        self._likes = Likes(DIMENSIONS)
        self._running = 0
        self._uncounted: OrderedDict[str, Floats] = OrderedDict()
        self._model: str | None = None
        self._number = 0
        self._client, self._generate = client, client.generate
        client.generate = self._watch
        self._task = asyncio.get_running_loop().create_task(self._read_always())

    def close(self) -> None:
        """Follow nothing more; requests under way go on."""
        self._client.generate = self._generate
        self._task.cancel()

    def stats(self) -> dict[str, Any]:
        """What Ray carries to request routers; empty until the engine has counted."""
        if self._model is None:
            return {}
        self._number += 1
        report = Report(
            self._model, self._gang, self._number, self._running, self._likes.mean, self._kinds
        )
        return {KEY: report.write()}

    def _watch(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> Any:
        """``AsyncLLM.generate``: an asynchronous generator of outputs."""
        outputs = self._generate(prompt, sampling_params, request_id, **options)
        return self._watched(outputs, request_id, _TEXT.get())

    async def _watched(
        self, outputs: Any, request_id: str, text: Floats | None
    ) -> AsyncIterator[Any]:
        if text is not None and self._model == BY_TEXT:
            self._learn(text, text)
        elif text is not None:
            self._uncounted[request_id] = text
            if len(self._uncounted) > MOST_REQUESTS:
                self._uncounted.popitem(last=False)
        self._running += 1
        try:
            # Closed with this generator, so that a client that hangs up ends its request.
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
        finally:
            self._running -= 1

    async def _read_always(self) -> None:
        while True:
            try:
                await self.read()
            except asyncio.CancelledError:
                raise
            except Exception as error:  # of an engine that is lost: others act on that
                logger.warning("sere-ray: no signatures now (%s)", type(error).__name__)
            await asyncio.sleep(PERIOD_SECONDS)

    async def read(self) -> None:
        """Take what the engine has counted since the last time."""
        taken = of_workers(await self._calls.signatures())
        if taken is None:
            self._go_by_text()
            return
        self._model = taken.model
        for request, rows, content in taken.signatures:
            text = self._uncounted.pop(_name(request), None)
            if rows < LEAST_ROWS or request.startswith(SCORING):
                continue
            self._learn(text, np.frombuffer(content, dtype=np.float32))

    def _go_by_text(self) -> None:
        """Engines on this device count nothing: what texts are like stands for their experts."""
        logger.info(
            "sere-ray: request_router = 'experts': engines on this device do not count the experts "
            "of prompts; requests are placed by what their texts are like"
        )
        self._model = BY_TEXT
        self._task.cancel()

    def _learn(self, text: Floats | None, signature: Floats) -> None:
        self._likes.add(signature)
        if text is not None:
            self._kinds.add(text, signature)


def _name(engines: str) -> str:
    """The id with which a request was given to vLLM, of the one that its engine has.

    vLLM appends a word of its own, and numbers the answers of a request that asks for several.
    """
    name, _, _ = engines.rpartition("-")
    return _CHILD.sub("", name)
