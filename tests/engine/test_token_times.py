"""Token times from vLLM's own numbers of requests; a running engine: tests/live/test_auto.py."""

import inspect
from types import SimpleNamespace

import pytest

from sere_ray.util.token_times import BUCKETS, bucket_of

AT = 100.0
"""Where the clocks begin."""


class Engine:
    """vLLM's output processor and loggers, told by hand what an engine core would answer."""

    def __init__(self, monkeypatch):
        from vllm.v1.engine.output_processor import OutputProcessor

        from sere_ray.engine import token_times

        self.now = AT
        monkeypatch.setattr(token_times, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.processor = OutputProcessor(None, log_stats=True)
        self.loggers = SimpleNamespace(stat_loggers=[])
        client = SimpleNamespace(logger_manager=self.loggers, output_processor=self.processor)
        self.times = token_times.watch_token_times(client)

    def add(self, *names):
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        for name in names:
            parameters = SamplingParams(detokenize=False)
            request = EngineCoreRequest(name, [1], None, parameters, None, AT, None, None, None)
            request.external_req_id = name
            self.processor.add_request(request, None)

    def step(self, at, tokens, ends=()):
        """Answers that the core made at a time; ``tokens``: how many for which request."""
        from vllm.v1.engine import EngineCoreOutput, FinishReason
        from vllm.v1.metrics.loggers import StatLoggerManager
        from vllm.v1.metrics.stats import IterationStats

        self.now, step = AT + at, IterationStats()
        finish = dict.fromkeys(ends, FinishReason.LENGTH)
        outputs = [
            EngineCoreOutput(name, [7] * count, finish_reason=finish.get(name))
            for name, count in tokens.items()
        ]
        self.processor.process_outputs(outputs, self.now, step)
        StatLoggerManager.record(self.loggers, None, step)

    def counted(self, at):
        """``{bucket: tokens}`` as they are read at a time."""
        self.now = AT + at
        counts = self.times.read()
        assert len(counts) == BUCKETS
        return {bucket: count for bucket, count in enumerate(counts) if count}


@pytest.fixture
def engine(monkeypatch):
    return Engine(monkeypatch)


def test_tokens_count_by_the_mean_time_of_their_request(engine):
    engine.add("slow", "fast")
    engine.step(0, {"slow": 1, "fast": 1})  # first tokens have no time
    for number in range(1, 6):
        engine.step(0.1 * number, {"fast": 1})
    engine.step(0.9, {"slow": 1, "fast": 1})  # fast: 6 tokens in 0.9 s, of which one took 0.4 s
    assert engine.counted(0.95) == {}
    assert engine.counted(1.0) == {bucket_of(0.9): 1, bucket_of(0.15): 6}
    engine.step(1.1, {"slow": 1, "fast": 1})
    assert engine.counted(2.0) == {bucket_of(0.9): 1, bucket_of(0.15): 6, bucket_of(0.2): 2}


def test_a_request_that_begins_and_ends_within_a_second(engine):
    engine.add("a", "b")
    engine.step(0, {"a": 1})
    engine.step(0.2, {"a": 1, "b": 1}, ends="b")  # one token: no time at all
    engine.step(0.3, {"a": 1}, ends="a")
    assert engine.counted(1.5) == {bucket_of(0.15): 2}
    assert not engine.times._requests, "requests that are gone are kept"
    assert engine.counted(9) == {bucket_of(0.15): 2}


def test_an_aborted_request(engine):
    engine.add("a")
    engine.step(0, {"a": 1})
    engine.step(0.2, {"a": 1})
    engine.processor.abort_requests(["a"], internal=True)
    assert engine.counted(1) == {bucket_of(0.2): 1}
    assert not engine.times._requests


def test_several_tokens_of_one_step_share_its_time(engine):
    """As speculative decoding makes them."""
    engine.add("a")
    engine.step(0, {"a": 2})
    engine.step(0.3, {"a": 3})
    assert engine.counted(1) == {bucket_of(0.1): 3}


def test_vllm_keeps_loggers_where_they_are_put():
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerManager

    source = inspect.getsource(AsyncLLM.__init__)
    assert "self.logger_manager" in source
    assert "self.output_processor = OutputProcessor(" in source
    assert "self.stat_loggers" in inspect.getsource(StatLoggerManager.record)


@pytest.mark.parametrize("client", [None, SimpleNamespace(logger_manager=None)])
def test_without_loggers_nothing_is_counted(client):
    from sere_ray.engine.token_times import watch_token_times

    assert not any(watch_token_times(client).read())
