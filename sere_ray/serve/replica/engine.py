"""The engine of a replica: Ray's wrapper of vLLM, with one process less."""

from typing import Any

from ray.llm._internal.serve.core.engine.protocol import LLMEngine
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

from sere_ray.engine.forked import forked_engines
from sere_ray.engine.vllm_internals import compute_in_engine_process

__all__ = ["LLMEngine", "SereEngine"]
"""The first is Ray's: what an engine of a replica is (for stand-ins)."""


class SereEngine(VLLMEngine):  # type: ignore[misc]
    """A rank of one worker computes in vLLM's engine process, as in vLLM's own server.

    Ray asks for a worker process of its own. On a CPU it and the engine process then wait for each
    other in busy loops (vLLM's ``SpinCondition``), which on a small machine take the cores from the
    ranks that compute. On a GPU it would be a Ray actor: each step goes through one more process,
    and vLLM schedules no step ahead of the running one.
    """

    @property
    def is_lost(self) -> bool:
        """Whether vLLM's engine has died; not before it was started."""
        return self._engine_client is not None and bool(self._engine_client.errored)

    def _start_async_llm_engine(
        self, engine_args: Any, engine_config: Any, placement_group: Any
    ) -> Any:
        compute_in_engine_process(engine_config)
        with forked_engines():
            return super()._start_async_llm_engine(engine_args, engine_config, placement_group)
