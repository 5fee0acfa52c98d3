"""Refusals: what this version cannot re-route, said before the model loads wherever possible."""

from pathlib import Path
from typing import Any

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.engine.option_checks import check_all_to_all, check_options, check_replicas
from sere_ray.engine.speculation import check_speculation
from sere_ray.engine.vllm_version import check_vllm_version, installed_vllm
from sere_ray.kernel.compiler import check_compiler
from sere_ray.kernel.limits import check_shape
from sere_ray.policy.capabilities import check_artifact, check_policy
from sere_ray.policy.policy import Policy, parse_key
from sere_ray.policy.startup import Startup
from sere_ray.util.errors import ArtifactError, UnsupportedError

KEY = "sere"
"""The key of ``additional_config`` that turns re-routing on."""


def sere_config(vllm_config: Any) -> object | None:
    """The value under ``additional_config["sere"]``, None where the feature is off."""
    additional = vllm_config.additional_config
    return additional.get(KEY) if isinstance(additional, dict) else None


def check_config(vllm_config: Any) -> tuple[Policy, Startup, SimilarityArtifact]:
    """Everything that can be known before the model loads.

    Args:
        vllm_config: vLLM's complete configuration, with the ``sere`` key.

    Returns:
        The policy, what else the key holds, and the artifact; valid for the configured model.

    Raises:
        PolicyError: a key is unknown, misspelt or out of range.
        ArtifactError: the artifact is missing, damaged, of another model, or says less of its
            layers than the rule reads.
        UnsupportedError: the vLLM version, platform, model or another option cannot work.
    """
    policy, startup = parse_key(sere_config(vllm_config))
    check_vllm_version(*installed_vllm())
    check_options(vllm_config)
    check_speculation(vllm_config)
    on_gpu = vllm_config.device_config.device_type == "cuda"
    check_policy(policy, on_gpu=on_gpu)
    if startup.dispatch == "all_to_all":
        check_all_to_all(vllm_config)
    if startup.replicas == "by_experts":
        check_replicas(vllm_config)
    if on_gpu:
        if startup.check_ranks:
            raise UnsupportedError(
                "sere.check_ranks = True: ranks are compared on CPU engines only; leave it out"
            )
        check_compiler()
    model = vllm_config.model_config
    if not model.is_moe:
        raise UnsupportedError(
            f"sere: the model {model.model!r} ({model.architecture}) has no experts to re-route; "
            "serve a mixture-of-experts model or remove the 'sere' key"
        )
    if on_gpu:
        check_shape(model.get_num_experts(), model.get_num_experts_per_tok())
    if policy.similarity_path.resolve().parent == Path(model.model).resolve():
        raise ArtifactError(
            f"{policy.similarity}: lies in the checkpoint's folder, where vLLM would load it as "
            "weights; move it elsewhere"
        )
    artifact = SimilarityArtifact.load(policy.similarity_path)
    artifact.check_model(
        architecture=model.hf_config.architectures[0],
        num_experts=model.get_num_experts(),
        top_k=model.get_num_experts_per_tok(),
        path=policy.similarity,
    )
    layers = model.hf_text_config.num_hidden_layers
    artifact.check_layers(
        range(layers), path=policy.similarity, but=f"the model's end at {layers - 1}"
    )
    check_artifact(policy, artifact)
    check_synthetic(policy, artifact, load_format=str(vllm_config.load_config.load_format))
    policy.check_layers(len(artifact.layers))
    return policy, startup, artifact


def check_synthetic(policy: Policy, artifact: SimilarityArtifact, *, load_format: str) -> None:
    """A synthetic artifact is for random weights only.

    Raises:
        ArtifactError: a synthetic artifact would serve a real model.
    """
    if artifact.metadata.synthetic and load_format != "dummy":
        raise ArtifactError(
            f"{policy.similarity}: synthetic = True, random numbers for benchmarks; it is accepted "
            f"only with load_format = 'dummy' (this is {load_format!r}): run `sere-ray calibrate`"
        )
