"""Whether an engine has room for one request more, from vLLM's own statistics of its scheduler.

Imports vLLM, so it is imported where an engine has started.
"""

from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

MOST_KV = 0.8
"""Share of the KV cache in use above which an engine has no room: beyond it requests of clients
would soon be preempted."""


class EngineLoad(AggregateStatLoggerBase):  # type: ignore[misc]
    """What the scheduler said of its last step.

    Args:
        max_num_seqs: most requests of a step.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._most = max_num_seqs
        self._running = self._waiting = 0
        self._kv = 0.0

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        """A step's answers have arrived."""
        if scheduler_stats is not None:
            self._running = scheduler_stats.num_running_reqs
            self._waiting = (
                scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            )
            self._kv = scheduler_stats.kv_cache_usage

    @property
    def has_room(self) -> bool:
        """Whether nobody waits, a place of the batch is free, and the KV cache is not near full."""
        return not self._waiting and self._running < self._most and self._kv <= MOST_KV

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def watch_load(client: Any) -> EngineLoad:
    """Follow an engine's load from now on.

    Args:
        client: vLLM's ``AsyncLLM``, started with statistics.
    """
    load = EngineLoad(client.vllm_config.scheduler_config.max_num_seqs)
    client.logger_manager.stat_loggers.append(load)
    return load
