"""Builds the application; ``import_path: sere_ray.serve:build_app`` of ``deploy/*.yaml``."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

from sere_ray.engine.plugin import check_will_load
from sere_ray.engine.vllm_version import installed_vllm
from sere_ray.masks.served import check_beside, check_level
from sere_ray.policy.capabilities import EngineKind, check_policy
from sere_ray.serve.config import ServeConfig
from sere_ray.serve.policy_actor.artifacts import read_artifact
from sere_ray.serve.policy_actor.auto_config import level_policies
from sere_ray.serve.replica import FORK_SERVER
from sere_ray.util.errors import UnsupportedError

ENGINE_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "gpu_memory_utilization": 0.05,  # here: the share of memory that must be free at the start
        "kv_cache_memory_bytes": 1 << 28,
    },
    "gpu": {},
}
RAY_SERVES_BELOW = "0.33"
"""The first vLLM that the pinned Ray does not serve; see the ledger in ``serve/__init__.py``."""
DRAIN_SECONDS = 60.0
"""How long requests under way may take to finish when a deployment stops."""


def build_app(args: dict[str, Any]) -> Any:
    """A Serve application with ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``.

    Args:
        args: fields of :class:`ServeConfig`.

    Returns:
        A ``ray.serve.Application``: an ingress, and ``num_replicas`` gangs of
        ``data_parallel_size`` replicas, each a vLLM engine with its shard of the experts.

    Raises:
        SereError: a field is unknown or out of range, Ray cannot serve this vLLM, or vLLM would
            leave out the plugin.
    """
    config = ServeConfig.parse(args)
    check_vllm_of_ray()
    if config.sere is not None:
        check_will_load()
    check_artifact(config)
    from sere_ray.serve.gateway.application import ingress_app  # pulls vLLM in: only when needed

    return ingress_app(config, llm_config(config))


def check_vllm_of_ray() -> None:
    """Refuse a vLLM that Ray's library for language models cannot import.

    Raises:
        UnsupportedError: names both versions, and what to do.
    """
    name, found = installed_vllm()
    if Version(found) >= Version(RAY_SERVES_BELOW):
        raise UnsupportedError(
            f"{name} {found}: Ray {version('ray')} serves vLLM below {RAY_SERVES_BELOW} only (it "
            "imports a module that is gone); install constraints/gpu.txt, or leave Ray out: "
            'vllm serve MODEL --additional-config \'{"sere": "policy.yaml"}\''
        )


def check_artifact(config: ServeConfig) -> None:
    """Check the policy against the engines, and, where its files are here, against their model.

    The policy actor checks again: it may run on another node.

    Raises:
        SereError: these engines cannot run the policy, a file is damaged, or a key does not fit
            its model.
    """
    if config.sere is None:
        return
    check_policy(config.sere, on_gpu=config.device == "gpu")
    files = {
        key: read_artifact(path, config.max_artifact_bytes)
        for key, path in config.sere.files.items()
        if path.is_file()
    }
    masks = files["masks"].parse_masks() if "masks" in files else None
    artifact = files["similarity"].parse() if "similarity" in files else None
    check_level(config.sere.level, masks, path=config.sere.masks)
    check_beside(masks, artifact, path=config.sere.masks)
    known = masks if artifact is None else artifact
    if known is None or (artifact is None and config.sere.similarity is not None):
        return
    top_k = known.metadata.top_k
    strengths = None if artifact is None else artifact.metadata.strengths
    config.sere.for_model(top_k=top_k, strengths=strengths)
    if config.auto is not None:
        level_policies(config.sere, config.auto, top_k)


def llm_config(config: ServeConfig) -> Any:
    """Ray's description of the engines."""
    from ray.serve.llm import LLMConfig

    from sere_ray.serve.replica import server

    gangs = config.data_parallel_size > 1
    # Two gangs of two ranks and the ingress fit into the two cores that Ray counts on a laptop.
    bundle = {"CPU": 0.25 if config.device == "cpu" else 1}
    environment = {}
    if config.device == "cpu":
        environment = {**share_cores(config.data_parallel_size), FORK_SERVER: "1"}
    options: dict[str, Any] = {
        # Ray's default holds tokens back for 50 ms to send them together.
        "stream_batching_interval_ms": 0,
        server.METRICS: config.metrics_interval_s,
        server.SCORE: config.scoring,
        server.BY_EXPERTS: config.request_router == "experts",
    }
    if config.sere is not None:
        options[server.OPTIONS] = {
            "policy": config.sere.model_dump()
            | {key: local(str(path)) for key, path in config.sere.files.items()},
            "folder": None if config.artifacts is None else local(config.artifacts),
            "max_artifact_bytes": config.max_artifact_bytes,
            "gangs": config.num_replicas,
            **engine_kind(config),
            "startup": config.startup.model_dump(exclude_unset=True),
            "auto": None if config.auto is None else config.auto.model_dump(exclude_unset=True),
            "starts_auto": config.starts_auto,
        }
    return LLMConfig(
        model_loading_config={"model_id": config.model_id, "model_source": local(config.model)},
        # For "gpu" Ray would give the GPU to a worker process beside each replica. Here the replica
        # holds it, and its engine process computes: see SereEngine.
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [bundle]},
        deployment_config={
            "num_replicas": config.num_replicas,
            # The bundle holds the cores that a rank needs.
            "ray_actor_options": {"num_cpus": 0, "num_gpus": int(config.device == "gpu")},
            "health_check_period_s": 2,
            "graceful_shutdown_timeout_s": DRAIN_SECONDS,
        },
        server_cls=server.SereGangServer if gangs else server.SereServer,
        engine_kwargs=engine_arguments(config),
        experimental_configs=options,
        callback_config={"callback_class": server.SkipDownload},
        runtime_env={"env_vars": {**environment, **config.env}},
        log_engine_metrics=config.metrics_interval_s is not None,
    )


def engine_arguments(config: ServeConfig) -> dict[str, Any]:
    """vLLM engine arguments of a configuration; the user's win over ours."""
    arguments: dict[str, Any] = {
        **ENGINE_DEFAULTS[config.device],
        "additional_config": {"sere": config.engine_key} if config.sere else {},
    }
    if config.data_parallel_size > 1:
        arguments |= {
            "data_parallel_size": config.data_parallel_size,
            "enable_expert_parallel": True,
        }
    return {**arguments, **config.engine}


def engine_kind(config: ServeConfig) -> EngineKind:
    """Kind of the engines that a configuration asks for."""
    return {"on_gpu": config.device == "gpu", "several_ranks": config.data_parallel_size > 1}


def local(path: str) -> str:
    """An absolute path, if ``path`` is one on this machine; else (a hub name) as it is."""
    expanded = Path(path).expanduser()
    return os.path.abspath(expanded) if expanded.exists() else path


def share_cores(ranks: int) -> dict[str, str]:
    """Environment variables of a CPU rank, so that the ranks of a host share its cores.

    vLLM would bind every rank to the same cores.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
