"""An engine that computes nothing, with the interface of Ray's replicas; see ``stand_in.py``."""

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from starlette.responses import StreamingResponse

from sere_ray.bench.stand_in import expected_words
from sere_ray.engine.worker_calls import CHANGES, GATES, SET_POLICY
from sere_ray.policy.capabilities import ANY_GATES
from sere_ray.serve.replica.engine import LLMEngine

STEP_SECONDS = 0.02


class StandInEngine(LLMEngine):  # type: ignore[misc]
    """One rank: it lives and dies with its replica."""

    is_lost = False

    def __init__(self, llm_config: Any) -> None:
        self._model = llm_config.model_id
        self._policy: dict[str, Any] | None = None

    async def start(self) -> None:
        """Nothing to load."""

    def routing_stats(self) -> dict[str, Any]:
        """Nothing to report."""
        return {}

    async def check_health(self) -> None:
        """Always healthy."""

    async def build_asgi_app(self) -> FastAPI:
        """One route: a word each ``STEP_SECONDS``, in OpenAI's form."""
        app = FastAPI()

        @app.post("/v1/completions")
        async def completions(request: dict[str, Any]) -> Any:
            words = expected_words(request["prompt"], request["max_tokens"])
            if request.get("stream"):
                return StreamingResponse(self._events(words), media_type="text/event-stream")
            await asyncio.sleep(STEP_SECONDS * len(words))
            choice = {"index": 0, "text": "".join(words), "finish_reason": "length"}
            usage = {"prompt_tokens": 1, "completion_tokens": len(words)}
            return {**self._fields(), "choices": [choice], "usage": usage}

        return app

    def _fields(self) -> dict[str, Any]:
        return {"id": uuid.uuid4().hex, "object": "text_completion", "model": self._model}

    async def _events(self, words: list[str]) -> AsyncGenerator[str, None]:
        fields = self._fields()
        for word in words:
            await asyncio.sleep(STEP_SECONDS)
            choice = {"index": 0, "text": word, "finish_reason": None}
            yield f"data: {json.dumps({**fields, 'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: Any = (), kwargs: Any = None
    ) -> list[Any]:
        """Take a policy, and say that gates keep it from nothing; everything else is refused.

        Raises:
            NotImplementedError: another method.
        """
        if method == GATES:
            return [ANY_GATES]
        if method not in CHANGES:
            raise NotImplementedError(method)
        if method == SET_POLICY:
            self._policy = args[0]
        return [None]

    async def resolve_lora(self, lora_model: Any) -> None:
        """Not needed by tests of faults."""
        raise NotImplementedError

    async def reset_prefix_cache(self) -> None:
        """Not needed by tests of faults."""
        raise NotImplementedError

    def chat(self, request: Any, raw_request_info: Any = None) -> Any:
        """Not needed by tests of faults."""
        raise NotImplementedError

    completions = embeddings = transcriptions = chat
