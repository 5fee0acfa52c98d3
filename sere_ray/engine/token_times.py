"""How long output tokens take: vLLM's own inter-token latencies, in the process that serves.

vLLM notes for every token when the engine core made it, on a CPU and on a GPU, for streams and for
whole answers, behind every proxy and without one: one source for all ways to serve. It is the time
of the engine; of the way to the client it knows nothing, and no policy changes that. An engine
hands the numbers of a step to its stat loggers; this one counts them.

Imports vLLM, so it is imported where an engine has started.
"""

from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from sere_ray.token_times import BUCKETS, bucket_of


class TokenTimes(AggregateStatLoggerBase):  # type: ignore[misc]
    """Tokens by bucket since the start; a request's first token is none of them."""

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        """Take the numbers of one step."""
        if iteration_stats is not None:
            for seconds in iteration_stats.inter_token_latencies_iter:
                self.counts[bucket_of(seconds)] += 1

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def watch_token_times(client: Any) -> TokenTimes:
    """Count the tokens of an engine from now on; none where ``disable_log_stats`` is set.

    Args:
        client: vLLM's ``AsyncLLM``, which takes loggers only before it knows its engine; None of
            an engine that is not vLLM's, as a stand-in of tests.
    """
    times = TokenTimes()
    if client is not None and client.logger_manager is not None:
        client.logger_manager.stat_loggers.append(times)
    return times
