"""Token times as vLLM hands them to a stat logger; a running engine: tests/live/test_auto.py."""

import inspect
from types import SimpleNamespace

import pytest

from sere_ray.token_times import quantile_ms


def test_counts_what_vllm_hands_to_its_loggers():
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import IterationStats

    from sere_ray.engine.token_times import watch_token_times

    assert "self.logger_manager" in inspect.getsource(AsyncLLM.__init__)
    assert "self.stat_loggers" in inspect.getsource(StatLoggerManager.record)
    client = SimpleNamespace(logger_manager=SimpleNamespace(stat_loggers=[]))
    times = watch_token_times(client)
    step = IterationStats()
    step.inter_token_latencies_iter.extend([0.004, 0.004, 0.02])
    StatLoggerManager.record(client.logger_manager, None, step)
    StatLoggerManager.record(client.logger_manager, None, None)
    assert sum(times.counts) == 3
    assert quantile_ms(times.counts, 0.5) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("client", [None, SimpleNamespace(logger_manager=None)])
def test_without_loggers_nothing_is_counted(client):
    from sere_ray.engine.token_times import watch_token_times

    assert not any(watch_token_times(client).counts)
