"""Time per output token (TPOT) of running requests, as vLLM counts it where an engine's answers
arrive: the same on a CPU and a GPU, for streams and whole answers, behind every proxy and without.

The TPOT of a request is its decode time over the tokens after its first one. Here it is taken of
every request for each second of its life, and counted once for each token of that second: the
numbers react at once, also where answers take minutes, and a single late token (a step with
another request's prompt) weighs as little as it does in the TPOT of the whole request.

It is the time of the engine; of the way to the client it knows nothing, and no policy changes that.
Imports vLLM, so it is imported where an engine has started.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import RequestStateStats

from sere_ray.token_times import BUCKETS, SLICE_SECONDS, bucket_of


@dataclass
class _Counted:
    """A request, and how far it has been counted."""

    stats: RequestStateStats  # vLLM's own: it still has the last numbers when the request is gone
    tokens: int
    last_token: float


class TokenTimes(AggregateStatLoggerBase):  # type: ignore[misc]
    """Tokens by bucket of their request's TPOT, since the start.

    Args:
        request_states: vLLM's running requests; it adds and removes them.
    """

    def __init__(self, request_states: Mapping[str, Any]) -> None:
        self._states = request_states
        self._requests: dict[str, _Counted] = {}
        self._counts = [0] * BUCKETS
        self._slice_ends = 0.0

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        """A step's answers have arrived."""
        self._end_slice_if_due()
        if iteration_stats is not None and iteration_stats.time_to_first_tokens_iter:
            for request_id, stats in ((i, state.stats) for i, state in self._states.items()):
                if request_id not in self._requests and stats.num_generation_tokens:
                    counted = _Counted(stats, stats.num_generation_tokens, stats.last_token_ts)
                    self._requests[request_id] = counted

    def read(self) -> list[int]:
        """``[BUCKETS]`` tokens; the seconds that have not ended yet are not in."""
        self._end_slice_if_due()  # an idle engine records nothing
        return list(self._counts)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def _end_slice_if_due(self) -> None:
        if (now := time.monotonic()) < self._slice_ends:
            return
        self._slice_ends = now + SLICE_SECONDS
        for request_id, request in list(self._requests.items()):
            all_tokens, last_token = (
                request.stats.num_generation_tokens,
                request.stats.last_token_ts,
            )
            if tokens := all_tokens - request.tokens:
                self._counts[bucket_of((last_token - request.last_token) / tokens)] += tokens
                request.tokens, request.last_token = all_tokens, last_token
            if request_id not in self._states:
                del self._requests[request_id]


def watch_token_times(client: Any) -> TokenTimes:
    """Count the tokens of an engine from now on; none where ``disable_log_stats`` is set.

    Args:
        client: vLLM's ``AsyncLLM``, which takes loggers only before it knows its engine; None of
            an engine that is not vLLM's, as a stand-in of tests.
    """
    if client is None or client.logger_manager is None:
        return TokenTimes({})
    times = TokenTimes(client.output_processor.request_states)
    client.logger_manager.stat_loggers.append(times)
    return times
