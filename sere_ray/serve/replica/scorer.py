"""Scores a sampled share of finished answers by the exact model (docs/operate.md).

A request that is sampled when it comes asks its engine for log-probabilities, which the client does
not see unless it asked for them. When its answer is whole, the same engine computes prompt and
answer as the prompt of an exact request, so every row is exact, and its ``prompt_logprobs`` are
compared with what was served. One pass runs at a time, and only while the engine has room. Whatever
goes wrong here is counted and leaves the answer alone.

Both sides are vLLM's raw log-probabilities, of the logits as the model makes them. So temperature,
penalties and structured outputs, which come after, have no part in the score.
"""

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sere_ray.observe.score import SCORED, Scores, TokenScore
from sere_ray.policy.tiers import XARG, forbids_score
from sere_ray.serve.by_experts.reporter import SCORING
from sere_ray.serve.replica.sampling import Sampler
from sere_ray.serve.replica.served import LEAST_TOKENS, Served

logger = logging.getLogger("ray.serve")
ROOM_CHECK_SECONDS = 0.05
UNSCORABLE_PROMPTS = ("multi_modal_data", "prompt_embeds", "encoder_prompt")
"""Keys of a prompt that is more than tokens."""


class ScoreConfig(BaseModel):
    """The part ``score`` of a deployment file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(0.005, ge=0, le=1, description="of requests that are sampled; 0 = none")
    max_tokens: int = Field(
        2048, ge=2, le=1 << 20, description="of prompt and answer; what is beyond is not scored"
    )
    queue: int = Field(8, ge=1, le=1024, description="answers of a rank that wait for their pass")
    wait_s: float = Field(10.0, gt=0, le=600, description="longest wait of one for room")
    timeout_s: float = Field(30.0, gt=0, le=600, description="longest pass")


def unscorable_engine(arguments: dict[str, Any]) -> str | None:
    """Why an engine with these arguments cannot be scored; None = it can.

    Args:
        arguments: of vLLM's engine, by name; those left out are its defaults.
    """
    mode = arguments.get("logprobs_mode", "raw_logprobs")
    if arguments.get("disable_log_stats"):
        return "engine.disable_log_stats: whether there is room is read from vLLM's statistics"
    if mode != "raw_logprobs":
        return f"engine.logprobs_mode = {mode!r}: only raw_logprobs can be compared"
    if arguments.get("max_logprobs", 20) == 0:
        return "engine.max_logprobs = 0: a sampled request needs 1"
    if arguments.get("kv_sharing_fast_prefill"):
        return "engine.kv_sharing_fast_prefill: vLLM refuses prompt_logprobs with it"
    return None


class Scorer:
    """Scores answers of one engine.

    Args:
        client: vLLM's ``AsyncLLM``; its ``generate`` is wrapped from now on.
        config: how many, and limits.
        has_room: whether the engine has room for a pass.
        version: of the policy that all ranks of the gang run; None = between two.
        draw: a number from 0 to 1, evenly distributed.
    """

    def __init__(
        self,
        client: Any,
        config: ScoreConfig,
        *,
        has_room: Callable[[], bool],
        version: Callable[[], int | None],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.scores = Scores()
        self._config, self._has_room, self._version = config, has_room, version
        self._sampler = Sampler(config.share, draw)
        # An engine makes one token more than its prompt has.
        self._most_tokens = min(config.max_tokens, client.model_config.max_model_len - 1)
        self._waiting: asyncio.Queue[tuple[float, Served]] = asyncio.Queue(config.queue)
        self._client, self._generate = client, client.generate
        client.generate = self._watch
        self._task = asyncio.get_running_loop().create_task(self._score_waiting())

    def close(self) -> None:
        """Score nothing more; requests under way go on."""
        self._client.generate = self._generate
        self._task.cancel()

    def _watch(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> Any:
        """``AsyncLLM.generate``: an asynchronous generator of outputs."""
        if forbids_score(sampling_params) or not self._sampler.takes():
            return self._generate(prompt, sampling_params, request_id, **options)
        if not _is_scorable(prompt, sampling_params):
            self.scores.count("unsupported")
            return self._generate(prompt, sampling_params, request_id, **options)
        return self._watched(prompt, sampling_params, request_id, options)

    async def _watched(
        self, prompt: Any, sampling_params: Any, request_id: str, options: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """The outputs of a sampled request, as if it were not."""
        from vllm.sampling_params import RequestOutputKind

        hides, asked = sampling_params.logprobs is None, sampling_params
        if hides:
            asked = sampling_params.clone()
            asked.logprobs = 1  # of the token, and of the likeliest one
        served = Served(sampling_params, self._version(), options.get("lora_request"))
        is_delta = sampling_params.output_kind == RequestOutputKind.DELTA
        is_whole = True
        try:
            # Closed with this generator, so that a client that hangs up ends its request.
            async with aclosing(self._generate(prompt, asked, request_id, **options)) as outputs:
                async for output in outputs:
                    try:
                        served.add(output, is_delta=is_delta)
                    except Exception:
                        is_whole = False
                    if hides:
                        _hide(output)
                    if output.finished:  # a client may ask for nothing after this one
                        self._queue_up(served, is_whole)
                    yield output
        finally:
            if not served.is_finished:
                self.scores.count("unfinished")

    def _queue_up(self, served: Served, is_whole: bool) -> None:
        """Let a finished answer wait for its pass, or count why not."""
        outcome = self._why_not(served, is_whole)
        if outcome is not None:
            self.scores.count(outcome)
        elif served.is_finished:
            self._waiting.put_nowait((time.monotonic(), served))

    def _why_not(self, served: Served, is_whole: bool) -> str | None:
        if not served.is_finished:
            return None  # counted as unfinished
        if not is_whole:
            return "failed"
        if served.version is None or served.version != self._version():
            return "policy_changed"
        if len(served.answer) < LEAST_TOKENS:
            return "too_short"
        served.cut(self._most_tokens)
        if len(served.answer) < LEAST_TOKENS:
            return "too_long"
        return "no_room" if self._waiting.full() else None

    async def _score_waiting(self) -> None:
        while True:
            since, served = await self._waiting.get()
            outcome, tokens = await self._score(since, served)
            if outcome == SCORED:
                assert served.version is not None
                self.scores.add(served.version, served.tier, tokens)
            else:
                self.scores.count(outcome)

    async def _score(self, since: float, served: Served) -> tuple[str, list[TokenScore]]:
        while not self._has_room():
            if time.monotonic() - since > self._config.wait_s:
                return "no_room", []
            await asyncio.sleep(ROOM_CHECK_SECONDS)
        try:
            async with asyncio.timeout(self._config.timeout_s):
                return SCORED, served.compare(await self._exact_logprobs(served))
        except TimeoutError:
            return "timed_out", []
        except Exception as error:  # also of an engine that is lost: others act on that
            logger.warning("sere-ray: an answer was not scored (%s)", type(error).__name__)
            return "failed", []

    async def _exact_logprobs(self, served: Served) -> Any:
        """vLLM's ``prompt_logprobs`` of prompt and answer, every row exact."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt = {
            "type": "token",
            "prompt_token_ids": served.prompt + served.answer,
            "cache_salt": secrets.token_hex(16),  # nobody finds its blocks
        }
        sampling = SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=1,
            detokenize=False,
            skip_reading_prefix_cache=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={XARG: "exact"},
        )
        name = f"{SCORING}{secrets.token_hex(8)}"
        outputs = self._generate(prompt, sampling, name, lora_request=served.lora_request)
        async with aclosing(outputs):
            async for output in outputs:
                return output.prompt_logprobs
        raise RuntimeError("no output")


def _is_scorable(prompt: Any, sampling_params: Any) -> bool:
    """Whether this is one answer to a prompt of tokens, and the client's own log-probabilities, if
    it asked for any, hold the likeliest token."""
    is_tokens = isinstance(prompt, dict) and (
        prompt["type"] == "token"
        if "type" in prompt
        else not any(prompt.get(key) is not None for key in UNSCORABLE_PROMPTS)
    )
    return (
        is_tokens
        and sampling_params.n == 1
        and sampling_params.logprobs != 0
        and not sampling_params.logprob_token_ids
        and not sampling_params.flat_logprobs
    )


def _hide(output: Any) -> None:
    """Take out of an output what its client did not ask for."""
    for completion in output.outputs:
        completion.logprobs, completion.cumulative_logprob = None, None
