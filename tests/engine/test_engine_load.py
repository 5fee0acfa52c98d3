"""Room for one more request, by vLLM's statistics; a running engine: tests/serve/test_scorer.py."""

import inspect
from types import SimpleNamespace

import pytest

MOST = 4


@pytest.mark.parametrize(
    ("said", "room"),
    [
        ({}, True),
        ({"num_running_reqs": MOST - 1, "kv_cache_usage": 0.8}, True),
        ({"num_running_reqs": MOST}, False),
        ({"num_waiting_reqs": 1}, False),
        ({"num_skipped_waiting_reqs": 1}, False),
        ({"kv_cache_usage": 0.81}, False),
    ],
)
def test_room(said, room):
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

    from sere_ray.engine.engine_load import watch_load

    loggers = SimpleNamespace(stat_loggers=[])
    scheduler = SimpleNamespace(max_num_seqs=MOST)
    load = watch_load(
        SimpleNamespace(
            logger_manager=loggers, vllm_config=SimpleNamespace(scheduler_config=scheduler)
        )
    )
    assert load.has_room, "an engine that has done nothing yet"
    StatLoggerManager.record(loggers, SchedulerStats(**said), None)
    assert load.has_room is room
    StatLoggerManager.record(loggers, None, None)
    assert load.has_room is room, "answers without statistics say nothing new"


def test_vllm_has_what_the_scorer_uses():
    """The scorer wraps ``generate`` of the client, and asks for log-probabilities as a client."""
    from vllm import SamplingParams
    from vllm.config import ModelConfig
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.request import Request

    generate = inspect.signature(AsyncLLM.generate).parameters
    assert list(generate)[1:4] == ["prompt", "sampling_params", "request_id"]
    assert "lora_request" in generate
    assert inspect.isasyncgenfunction(AsyncLLM.generate)
    defaults = SamplingParams()
    assert (defaults.n, defaults.logprobs, defaults.logprob_token_ids) == (1, None, None)
    assert defaults.flat_logprobs is False
    fields = ModelConfig.__dataclass_fields__
    assert fields["logprobs_mode"].default == "raw_logprobs"
    assert "skip_reading_prefix_cache" in inspect.getsource(Request)
