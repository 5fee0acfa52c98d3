"""Time per output token (TPOT) of running requests, as vLLM counts it where an engine's answers
arrive: the same on a CPU and a GPU, for streams and whole answers, behind every proxy and without.

The TPOT of a request is its decode time over the tokens after its first one. Here it is taken of
every request for each second of its life, and counted once for each token of that second: the
numbers react at once, also where answers take minutes, and a single late token (a step with
another request's prompt) is one of a second's.

It is the time of the engine; of the way to the client it knows nothing, and no policy changes that.
Imports vLLM, so it is imported where an engine has started.
"""

import time
from collections.abc import Mapping
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import RequestStateStats

from sere_ray.util.token_times import BUCKETS, SLICE_SECONDS, bucket_of


class _Counted:
    """A request, and how far it has been counted: from the tokens on that it has now.

    Args:
        stats: vLLM's own; they still hold the last numbers when the request is gone.
    """

    def __init__(self, stats: RequestStateStats) -> None:
        self._stats = stats
        self._tokens, self._at = stats.num_generation_tokens, stats.last_token_ts

    def advance(self) -> tuple[int, float]:
        """Tokens since the last call, and the seconds that they took."""
        tokens, at = self._tokens, self._at
        self._tokens, self._at = self._stats.num_generation_tokens, self._stats.last_token_ts
        return self._tokens - tokens, self._at - at


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
            for request_id, state in self._states.items():
                if request_id not in self._requests and state.stats.num_generation_tokens:
                    self._requests[request_id] = _Counted(state.stats)

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
            tokens, seconds = request.advance()
            if tokens:
                self._counts[bucket_of(seconds / tokens)] += tokens
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
