"""Refusals: what this version cannot re-route, said before the model loads wherever possible."""

from pathlib import Path
from typing import Any, NamedTuple

from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.engine.option_checks import (
    check_all_to_all,
    check_masks,
    check_options,
    check_replicas,
    check_tensor_and_data_parallel,
)
from sere_ray.engine.speculation import check_speculation
from sere_ray.engine.vllm_version import check_vllm_version, installed_vllm
from sere_ray.kernel.compiler import check_compiler
from sere_ray.kernel.limits import check_shape
from sere_ray.masks.artifact import MasksArtifact, MasksMetadata
from sere_ray.masks.served import check_beside, layers_of, load_masks
from sere_ray.policy.capabilities import check_artifact, check_policy
from sere_ray.policy.key import parse_key
from sere_ray.policy.policy import Policy
from sere_ray.policy.startup import Startup
from sere_ray.util.errors import ArtifactError, UnsupportedError

KEY = "sere"
"""The key of ``additional_config`` that turns re-routing on."""


def sere_config(vllm_config: Any) -> object | None:
    """The value under ``additional_config["sere"]``, None where the feature is off."""
    additional = vllm_config.additional_config
    return additional.get(KEY) if isinstance(additional, dict) else None


class Checked(NamedTuple):
    """What the key of an engine holds and names, valid for the configured model."""

    policy: Policy
    startup: Startup
    artifact: SimilarityArtifact | None
    masks: MasksArtifact | None


def check_config(vllm_config: Any) -> Checked:
    """Everything that can be known before the model loads.

    Args:
        vllm_config: vLLM's complete configuration, with the ``sere`` key.

    Raises:
        PolicyError: a key is unknown, misspelt or out of range.
        ArtifactError: a file is missing, damaged, of another model, or has less than the policy
            asks for.
        UnsupportedError: the vLLM version, platform, model or another option cannot work.
    """
    policy, startup = parse_key(sere_config(vllm_config))
    check_vllm_version(*installed_vllm())
    check_options(vllm_config)
    check_tensor_and_data_parallel(vllm_config, startup, policy.union)
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
        if policy.masks is not None:
            check_masks(vllm_config)
        check_compiler()
    model = vllm_config.model_config
    if not model.is_moe:
        raise UnsupportedError(
            f"sere: the model {model.model!r} ({model.architecture}) has no experts to re-route; "
            "serve a mixture-of-experts model or remove the 'sere' key"
        )
    if on_gpu:
        check_shape(model.get_num_experts(), model.get_num_experts_per_tok())
    for key, path in policy.files.items():
        if path.resolve().parent == Path(model.model).resolve():
            raise ArtifactError(
                f"{getattr(policy, key)}: lies in the checkpoint's folder, where vLLM would load "
                "it as weights; move it elsewhere"
            )
    artifact, masks = _load_artifact(policy, vllm_config), load_masks(policy)
    if masks is not None:
        # Layers and gates are compared as the model loads.
        experts, top_k = model.get_num_experts(), model.get_num_experts_per_tok()
        masks.check_same(str(policy.masks), "num_experts", masks.metadata.num_experts, experts)
        masks.check_same(str(policy.masks), "top_k", masks.metadata.top_k, top_k)
        check_synthetic(str(policy.masks), masks.metadata, vllm_config)
    check_beside(masks, artifact, path=policy.masks)
    policy.check_layers(len(layers_of(artifact, masks)))
    return Checked(policy, startup, artifact, masks)


def _load_artifact(policy: Policy, vllm_config: Any) -> SimilarityArtifact | None:
    if policy.similarity is None or policy.similarity_path is None:
        return None
    model = vllm_config.model_config
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
    check_synthetic(policy.similarity, artifact.metadata, vllm_config)
    return artifact


def check_synthetic(
    path: str, metadata: ArtifactMetadata | MasksMetadata, vllm_config: Any
) -> None:
    """Synthetic files are for random weights only.

    Raises:
        ArtifactError: one would serve a real model.
    """
    load_format = str(vllm_config.load_config.load_format)
    if metadata.synthetic and load_format != "dummy":
        makes = "calibrate" if isinstance(metadata, ArtifactMetadata) else "train-masks"
        raise ArtifactError(
            f"{path}: synthetic = True, random numbers for benchmarks; it is accepted only with "
            f"load_format = 'dummy' (this is {load_format!r}): run `sere-ray {makes}`"
        )
