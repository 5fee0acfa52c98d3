"""Refusals of vLLM's options, said before the model loads."""

from typing import Any

from packaging.version import Version

from sere_ray.engine.vllm_version import installed_vllm
from sere_ray.policy.startup import Startup
from sere_ray.util.errors import UnsupportedError

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
    _refuse("sere", refused)


def _unsalted_connectors(config: Any) -> list[str]:
    """Those that are not among ``KV_CONNECTORS``, of a ``MultiConnector`` its parts."""
    if config is None or config.kv_connector is None:
        return []
    names = [config.kv_connector]
    if names == ["MultiConnector"]:
        parts = config.kv_connector_extra_config.get("connectors", [])
        names = [str(part.get("kv_connector")) for part in parts]
    return [name for name in names if name not in KV_CONNECTORS]


def check_tensor_and_data_parallel(vllm_config: Any, startup: Startup, union: str) -> None:
    """Refuse tensor and data parallelism at once where it cannot work, or nobody asked for it.

    Args:
        vllm_config: vLLM's complete configuration.
        startup: of the engine.
        union: key of the policy.

    Raises:
        UnsupportedError: names the option, its value and what to do.
    """
    parallel = vllm_config.parallel_config
    sizes = parallel.data_parallel_size, parallel.tensor_parallel_size
    both = f"data_parallel_size = {sizes[0]} with tensor_parallel_size = {sizes[1]}"
    are_both, asked = min(sizes) > 1, startup.tensor_and_data_parallel
    one = "use tensor_parallel_size = 1 or data_parallel_size = 1"
    recorded = vllm_config.aux_output_config.enable_return_routed_experts
    refused = [
        (
            asked and not are_both,
            f"tensor_and_data_parallel = True: {both}, so there is nothing to switch on",
            "leave it out",
        ),
        (
            are_both and vllm_config.device_config.device_type == "cpu",
            f"{both} on a CPU: rows of a rank are spread over its workers",
            one,
        ),
        (
            are_both and not asked,
            f"{both}: has run in the emulator alone, on no GPUs yet",
            f"{one}, or switch it on by its name: tensor_and_data_parallel = True under 'sere'",
        ),
        (
            are_both and parallel.all2all_backend != "allgather_reducescatter",
            f"{both} and all2all_backend = {parallel.all2all_backend!r}: not tried",
            "use 'allgather_reducescatter'",
        ),
        (
            are_both and parallel.enable_eplb,
            f"{both} and enable_eplb = True: not tried",
            "start without the load balancer",
        ),
        (
            are_both and recorded,
            f"{both} and enable_return_routed_experts = True: not tried",
            "start without it",
        ),
        (
            are_both and union == "local",
            f"union = 'local': {both}, so a rank's rows may lie on several workers",
            "use union = 'global'",
        ),
    ]
    _refuse("sere", refused)


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
    _refuse("sere.dispatch = 'all_to_all'", refused)


def check_masks(vllm_config: Any) -> None:
    """Refuse learned masks on a GPU beside what they were not built for.

    Raises:
        UnsupportedError: names the option, its value and what to do.
    """
    parallel = vllm_config.parallel_config
    refused = [
        (
            parallel.world_size_across_dp > 1,
            f"an engine of {parallel.world_size_across_dp} GPUs: ranks do not tell each other what "
            "masks left out",
            "use one GPU, or leave masks and level out",
        ),
        (
            vllm_config.model_config.enable_sleep_mode,
            "enable_sleep_mode = True: the memory of mask routers, and of gates beside them, would "
            "be given away",
            "start without it, or leave masks and level out",
        ),
    ]
    _refuse("sere.masks", refused)


SHOWN_ON_GPUS = False
"""Whether an engine with ``replicas: by_experts`` ran on GPUs and tests of it passed there. None is
written yet: those of `tests/engine/test_gpu_load_balancer.py` run with vLLM's own choice."""


def check_replicas(vllm_config: Any) -> None:
    """Refuse ``replicas: by_experts`` where there are no copies to choose among, or not by us.

    Raises:
        UnsupportedError: names the option, its value and what to do.
    """
    parallel = vllm_config.parallel_config
    refused = [
        (
            vllm_config.device_config.device_type == "cpu",
            "vLLM has no load balancer (EPLB) on a CPU, so an expert has one copy",
            "leave it out",
        ),
        (
            not parallel.enable_eplb or parallel.data_parallel_size == 1,
            f"data_parallel_size = {parallel.data_parallel_size} with enable_eplb = "
            f"{parallel.enable_eplb}: no rank chooses among copies",
            "use it with data_parallel_size > 1 and enable_eplb, or leave it out",
        ),
        (
            not SHOWN_ON_GPUS,
            "it has run in the emulator alone, on no GPU yet",
            "leave it out: then vLLM spreads rows over copies",
        ),
    ]
    _refuse("sere.replicas = 'by_experts'", refused)


def _refuse(key: str, refused: list[tuple[bool, str, str]]) -> None:
    for is_refused, what, remedy in refused:
        if is_refused:
            raise UnsupportedError(f"{key}: {what}; {remedy}")
