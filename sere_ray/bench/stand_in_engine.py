"""An engine that computes nothing, with the interface of Ray's replicas; see ``stand_in.py``."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from sere_ray.bench.stand_in import expected_words
from sere_ray.engine.worker_calls import CHANGES, SET_POLICY
from sere_ray.serve.replica.engine import CompletionResponse, LLMEngine

STEP_SECONDS = 0.02


class StandInEngine(LLMEngine):  # type: ignore[misc]
    """One rank: it lives and dies with its replica."""

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

    async def completions(
        self, request: Any, raw_request_info: Any = None
    ) -> AsyncGenerator[Any, None]:
        """A word each ``STEP_SECONDS``, in OpenAI's form."""
        words = expected_words(request.prompt, request.max_tokens)
        fields = {"id": request.request_id, "object": "text_completion", "model": self._model}
        if request.stream:
            for word in words:
                await asyncio.sleep(STEP_SECONDS)
                choice = {"index": 0, "text": word, "finish_reason": None}
                yield f"data: {json.dumps({**fields, 'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"
            return
        await asyncio.sleep(STEP_SECONDS * len(words))
        choice = {"index": 0, "text": "".join(words), "finish_reason": "length"}
        usage = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": len(words)}
        yield CompletionResponse.model_validate({**fields, "choices": [choice], "usage": usage})

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: Any = (), kwargs: Any = None
    ) -> list[Any]:
        """Take a policy; everything else is refused.

        Raises:
            NotImplementedError: another method.
        """
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

    embeddings = transcriptions = chat
