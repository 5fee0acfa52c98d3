"""The engine of a replica: Ray's wrapper of vLLM, with one process less on a CPU."""

from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine


class SereEngine(VLLMEngine):  # type: ignore[misc]
    """A rank of one CPU worker computes in vLLM's engine process.

    Ray asks for a worker process of its own. It and the engine process then wait for each other
    in busy loops (vLLM's ``SpinCondition``), which on a small machine take the cores from the
    ranks that compute, and each start imports vLLM once more.
    """

    def _start_async_llm_engine(
        self, engine_args: Any, engine_config: Any, placement_group: Any
    ) -> Any:
        from vllm.platforms import current_platform
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        parallel = engine_config.parallel_config
        if current_platform.is_cpu() and parallel.world_size == 1:
            parallel.distributed_executor_backend = UniProcExecutor
        return super()._start_async_llm_engine(engine_args, engine_config, placement_group)
