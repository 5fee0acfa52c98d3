"""Builds the application; ``import_path: sere_ray.serve:build_app`` of ``deploy/*.yaml``."""

from typing import Any

from sere_ray.serve.config import ServeConfig

ENGINE_DEFAULTS: dict[str, Any] = {
    "gpu_memory_utilization": 0.2,  # on CPU: the share of memory that must be free at the start
    "kv_cache_memory_bytes": 1 << 28,
}


def build_app(args: dict[str, Any]) -> Any:
    """A Serve application with ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``.

    Args:
        args: fields of :class:`ServeConfig`.

    Returns:
        A ``ray.serve.Application`` with one replica, which is one vLLM engine.

    Raises:
        SereError: a field is unknown or out of range.
    """
    config = ServeConfig.parse(args)
    from ray.serve.llm import LLMConfig, build_openai_app  # pulls vLLM in: only when needed

    llm = LLMConfig(
        model_loading_config={"model_id": config.model_id, "model_source": config.model},
        accelerator_config={"kind": config.device},
        placement_group_config={"bundles": [{"CPU": 1}]},
        deployment_config={"num_replicas": 1},
        engine_kwargs=engine_arguments(config),
        # Ray's default holds tokens back for 50 ms to send them together.
        experimental_configs={"stream_batching_interval_ms": 0},
        log_engine_metrics=False,
    )
    return build_openai_app({"llm_configs": [llm]})


def engine_arguments(config: ServeConfig) -> dict[str, Any]:
    """vLLM engine arguments of a configuration; the user's win over ours."""
    additional = {"sere": config.sere.model_dump()} if config.sere else {}
    return {**ENGINE_DEFAULTS, "additional_config": additional, **config.engine}


def deployment_name(model_id: str) -> str:
    """Name of the Serve deployment that holds the engine of a model."""
    return "LLMServer:" + model_id.replace("/", "--").replace(".", "_")
