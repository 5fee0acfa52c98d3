"""Questions to an OpenAI endpoint, so many at a time, and its whole answers."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request

from sere_ray.util.errors import SereError
from sere_ray.util.http import open_url

_TIMEOUT_SECONDS = 600.0
_BUSY = {429, 503}
"""Answers of a server that may take the request later."""
_PATIENCE_SECONDS = 180.0
"""How long a server may be busy, or its engine be started anew."""
_PAUSE_SECONDS = 2.0


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str
    tokens: int
    """As the server counts them, the end included."""
    finish: str
    """``stop`` or ``length``."""


@dataclass(frozen=True)
class Endpoint:
    """Whom to ask."""

    url: str
    """Without ``/v1``."""
    model: str
    key: str | None
    concurrency: int
    """Requests under way. Without it a re-routed accuracy means nothing: batches are smaller."""
    max_tokens: int
    """Of an answer, at most."""
    temperature: float = 0.0
    """Of sampling; each question has a seed of its own, the same under every policy."""

    def chats(self, prompts: Sequence[str]) -> list[Reply]:
        """The answers to messages of a user, in their order.

        Raises:
            SereError: the endpoint is not there, or refuses; with its own words.
        """
        messages = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
        return self._ask("chat/completions", messages)

    def completions(self, prompts: Sequence[str]) -> list[Reply]:
        """How texts go on, in their order.

        Raises:
            SereError: as :meth:`chats`.
        """
        return self._ask("completions", [{"prompt": prompt} for prompt in prompts])

    def _ask(self, route: str, questions: list[dict[str, Any]]) -> list[Reply]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting = [
                pool.submit(self._answer, route, {**question, "seed": number})
                for number, question in enumerate(questions)
            ]
            try:
                return [each.result() for each in waiting]
            finally:
                for each in waiting:  # after an error; no effect on those that are done
                    each.cancel()

    def _answer(self, route: str, question: dict[str, Any]) -> Reply:
        address = f"{self.url.rstrip('/')}/v1/{route}"
        sampling = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        body = {"model": self.model, **sampling, **question}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                request = Request(address, json.dumps(body).encode(), headers)
                with open_url(request, _TIMEOUT_SECONDS) as response:
                    return _reply(json.load(response))
            except HTTPError as error:
                if error.code not in _BUSY or time.monotonic() > end:
                    raise SereError(f"{address}: {error.code}: {_words(error)}") from None
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise SereError(f"{address}: no OpenAI answer ({error!r})") from None
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", error) or type(error).__name__
                raise SereError(f"{address}: {reason}; is it up?") from None
            time.sleep(_PAUSE_SECONDS)


def _reply(answer: dict[str, Any]) -> Reply:
    choice = answer["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    tokens = int(answer["usage"]["completion_tokens"])
    return Reply(text or "", tokens, str(choice["finish_reason"]))


def _words(error: HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
