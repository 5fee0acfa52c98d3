"""Fails when vLLM changes under a patch of `sere_ray/engine/patches.py`.

Runs against the installed vLLM and, by `test_drift_of_next.py`, against the next one. Not guarded:
what the patched functions compute. The engine tests show that.
"""

import ast
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version
from vllm import __version__
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.model_executor.layers.fused_moe.runner import moe_runner
from vllm.model_executor.model_loader import base_loader
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker import gpu_model_runner, gpu_worker, worker_base
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu.spec_decode.eagle.utils import load_eagle_model
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from sere_ray.engine.patches import _MARK

IS_033 = Version(__version__) >= Version("0.33")


def original(function):
    return getattr(function, _MARK, function)


def parameters(function):
    return list(inspect.signature(original(function)).parameters)


def source(function):
    return inspect.getsource(original(function))


def test_config_is_validated_in_post_init():
    assert parameters(VllmConfig.__post_init__) == ["self"]
    assert "additional_config" in VllmConfig.__dataclass_fields__


def test_runner_holds_a_router_whose_routing_is_a_template_method():
    assert "self.router = router" in source(moe_runner.MoERunner.__init__)
    assert "self.router.select_experts(" in source(moe_runner.MoERunner._apply_quant_method)
    router = base_router.BaseRouter
    assert parameters(router._compute_routing)[:3] == ["self", "hidden_states", "router_logits"]
    template = source(router._select_experts)
    steps = ["self._compute_routing(", "self.capture_fn(", "self._apply_eplb_mapping("]
    assert [template.index(step) for step in steps] == sorted(template.index(s) for s in steps)


@pytest.mark.skipif(IS_033, reason="learned masks on GPUs were built for 0.32")
def test_layers_call_their_gate_themselves():
    """For ``engine/gpu/mask_router.py``: inside the op, so that no compiled graph holds it."""
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear

    runner = inspect.getsource(moe_runner.MoERunner)
    assert "router_logits, _ = self.gate(hidden_states)" in runner
    assert "self._fse_fuse_gate = " in source(moe_runner.MoERunner.__init__)
    forward = source(GateLinear.forward)
    for name in ("out_dtype", "allow_fp32_router_gemm", "allow_bf16x3_router_gemm"):
        assert f"self.{name}" in forward


def test_copies_are_mapped_by_one_method_from_tables_of_the_layer():
    """For ``engine/gpu/copies.py`` and the hash of ``kernels/cuda/replicas.cu``."""
    from vllm.distributed.eplb.eplb_state import EplbLayerState

    assert parameters(base_router.BaseRouter._apply_eplb_mapping) == ["self", "topk_ids"]
    fields = ("expert_load_view", "logical_to_physical_map", "logical_replica_count")
    fields += ("should_record_tensor", "num_unpadded_tokens_tensors")
    assert set(fields) <= set(EplbLayerState.__dataclass_fields__)
    kernel = inspect.getsource(base_router)
    assert "token_idx * KNUTH_MULTIPLIER) & 0xFFFFFFFF" in kernel
    assert "KNUTH_MULTIPLIER = 2654435769" in kernel
    assert "replica_idx = hashed % replica_count" in kernel


def test_a_layer_says_into_how_many_shards_its_rows_are_cut():
    """What follows from it: ``test_cuda_shards.py``."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig

    assert "self.moe_parallel_config.sp_size" in source(FusedMoEConfig.sp_size.fget)
    assert "sp_size" in FusedMoEParallelConfig.__dataclass_fields__


def test_recorded_ids_are_what_a_router_returns_as_narrow_numbers():
    from vllm.distributed.aux_output_connector import worker
    from vllm.model_executor.layers.fused_moe import routed_experts_capturer

    capturer = routed_experts_capturer.RoutedExpertsCapturer
    assert parameters(capturer.__init__) == ["self", "max_num_batched_tokens", "vllm_config"]
    init = source(capturer.__init__)
    assert 'self.output_dtype_name = "uint8" if num_experts <= 256 else "uint16"' in init
    assert "self.output_dtype = getattr(torch, self.output_dtype_name)" in init
    assert "].to(self.output_dtype)" in source(capturer.snapshot_routing_data)
    assert "module.router.set_capture_fn(capture_fn)" in source(
        routed_experts_capturer.bind_routed_experts_capturer
    )
    connector = source(worker.AuxOutputWorkerConnector.__init__)
    assert "vllm_config=vllm_config" in connector
    assert "np.dtype(self._capturer.output_dtype_name)" in connector


def test_processes_of_an_engine_come_from_one_context():
    """Those that the fork server forks: ``sere_ray/engine/forked.py``."""
    from vllm.v1.engine import coordinator, utils

    starters = ((utils, utils.CoreEngineProcManager), (coordinator, coordinator.DPCoordinator))
    for place, made in starters:
        assert "context = get_mp_context()" in source(made.__init__)
        assert "context.Process(" in source(made.__init__)
        assert "get_mp_context" in vars(place)


def test_row_kinds_are_known_around_a_forward_pass():
    runner = gpu_model_runner.GPUModelRunner
    assert "self._model_forward(" in source(runner.execute_model)
    assert "self._model_forward(" not in source(runner._dummy_run)
    assert "_model_forward" not in vars(CPUModelRunner)
    fields = ("num_tokens_no_spec", "num_computed_tokens_cpu", "num_prompt_tokens")
    batch = source(InputBatch.__init__) + source(InputBatch)
    for name in fields:
        assert f"self.{name}" in batch
    assert "self.query_start_loc.np[" in source(runner._prepare_inputs)


def test_drafts_of_a_request_are_its_last_rows_and_not_known_tokens():
    """In V1; in V2 a request prefills by the tokens that it was scheduled with."""
    update = source(InputBatch.update_req_spec_token_ids)
    assert "num_tokens_no_spec[" in update
    assert not re.search(r"num_tokens_no_spec\[\w+\] (\+|-)?= ", update)


def test_a_draft_model_is_told_by_its_configuration():
    fields = SpeculativeConfig.__dataclass_fields__
    assert {"draft_model_config", "target_model_config", "method"} <= set(fields)
    assert "enable_adaptive_verification" in fields
    made = source(SpeculativeConfig.__post_init__)
    assert "self.draft_model_config = self.target_model_config" in made  # n-grams
    assert "self.draft_model_config = ModelConfig(" in made
    assert "model_config=self.speculative_config.draft_model_config" in source(
        SpecDecodeBaseProposer._get_model
    )
    assert "model_config=spec.draft_model_config" in source(
        DraftModelProposer._create_draft_vllm_config
    )
    assert "model_config=draft_model_config" in source(load_eagle_model)
    assert "model_config=self.draft_model_config" in source(StandaloneARSpeculator.load_draft_model)


def test_the_scheduler_knows_which_drafts_were_accepted():
    call = source(Scheduler.update_from_output).partition("self.make_spec_decoding_stats(")[2]
    call = call.partition(")\n")[0]
    assert "num_draft_tokens=num_draft_tokens" in call
    assert "num_accepted_tokens=num_accepted" in call
    assert "schedule" not in vars(AsyncScheduler)
    assert "self.vllm_config = vllm_config" in source(Scheduler.__init__)
    assert parameters(gpu_worker.Worker.execute_model) == ["self", "scheduler_output"]
    assert not hasattr(SchedulerOutput, "__slots__")


def test_weights_are_processed_by_module_global_name_after_loading():
    loader = source(base_loader.BaseModelLoader.load_model)
    load = loader.index("self.load_weights(")
    assert load < loader.index("process_weights_after_loading(model, model_config, target_device)")


def test_a_model_is_created_before_its_weights_load():
    """There it is known whether any layer was attached."""
    create = base_loader.BaseModelLoader.create_model
    assert parameters(create) == ["self", "vllm_config", "model_config", "prefix"]
    load = source(base_loader.BaseModelLoader.load_model)
    call = load.partition("self.create_model(")[2].partition(")")[0]
    assert all(f"{name}={name}," in call for name in ("vllm_config", "model_config", "prefix"))
    assert load.index("self.create_model(") < load.index("self.load_weights(")


def test_what_is_checked_of_a_layer():
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.experts.fallback import FallbackExperts

    fields = FusedMoEConfig.__dataclass_fields__
    assert {"experts_per_token", "num_logical_experts"} <= set(fields)
    init = source(moe_runner.MoERunner.__init__)
    assert "self.gate = gate" in init
    assert "self.routed_experts = routed_experts" in init
    assert "self.routed_experts.forward_modular(" in source(
        moe_runner.MoERunner._apply_quant_method
    )
    assert callable(FallbackExperts.get_clses)
    assert parameters(gpu_worker.Worker.reload_weights) == ["self", "args", "kwargs"]


def test_adapters_are_loaded_by_one_method():
    from vllm.lora import model_manager, worker_manager
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    load = LoRAModelRunnerMixin.load_lora_model
    assert parameters(load) == ["self", "model", "vllm_config", "device"]
    assert "self.lora_manager = LRUCacheWorkerLoRAManager(" in source(load)
    manager = worker_manager.WorkerLoRAManager
    assert parameters(manager._load_adapter) == ["self", "lora_request"]
    assert "_load_adapter" not in vars(worker_manager.LRUCacheWorkerLoRAManager)
    for owner in (manager, worker_manager.LRUCacheWorkerLoRAManager):
        assert "self._load_adapter(" in source(owner.add_adapter)
        assert "self._adapter_manager = lora_manager" in source(owner.create_lora_manager)
    register = source(model_manager.LoRAModelManager.register_module)
    assert "self.modules[module_name] = module" in register


def test_kernels_are_rebound_by_module_global_name():
    from vllm.triton_utils import dispatcher

    assert "    _rebind_kernels(" in source(dispatcher.register_kernels)
    assert "list(sys.modules.values())" in source(dispatcher._rebind_kernels)


def test_requests_and_calls_pass_through_the_engine_core():
    assert parameters(EngineCore.preprocess_add_request) == ["self", "request"]
    assert parameters(EngineCore.add_request)[:2] == ["self", "request"]
    assert parameters(EngineCore.collective_rpc)[:2] == ["self", "method"]


def test_requests_that_wait_have_no_blocks_and_may_be_hashed_anew():
    init = source(Scheduler.__init__)
    assert "self.waiting = create_request_queue(" in init
    assert "self.kv_holding_waiting = create_request_queue(" in init
    assert "self.requests: dict[str, Request] = {}" in init
    for name in ("connector", "aux_output_connector", "hash_block_size"):
        assert f"self.{name} = " in init or f"self.{name}: " in init
    assert "self.block_hashes.extend(self._block_hasher(self))" in source(
        Request.update_block_hashes
    )


def test_a_chain_of_hashes_can_be_cut():
    """Each hash follows from the last one, found by its number; nothing older is read again."""
    from vllm.v1.core import kv_cache_utils

    hasher = source(kv_cache_utils.get_request_block_hasher)
    assert "start_token_idx = len(request.block_hashes) * hash_block_size" in hasher
    assert "request.block_hashes[-1] if request.block_hashes else None" in hasher
    assert hasher.count("request.block_hashes") == 3
    assert "self.request_block_hasher = get_request_block_hasher(" in source(EngineCore.__init__)
    salted = source(kv_cache_utils.generate_block_hash_extra_keys)
    assert '[("cache_salt", request.cache_salt)]' in salted
    assert "(start_token_idx == 0 and request.cache_salt)" in salted


def test_which_connectors_find_blocks_by_what():
    """`KV_CONNECTORS` of `option_checks.py`: by request, by vLLM's hashes, or by `cache_salt`."""
    folder = "distributed.kv_transfer.kv_connector.v1"
    multi = ast.unparse(tree_of(f"{folder}.multi_connector"))
    assert "def sub_connectors(self)" in multi
    for by_hashes in (f"{folder}.offloading.scheduler", f"{folder}.mooncake.store.scheduler"):
        assert ".block_hashes" in ast.unparse(tree_of(by_hashes))
    assert "gpu_block.block_hash" in ast.unparse(tree_of("v1.simple_kv_offload.manager"))
    lmcache = ast.unparse(tree_of(f"{folder}.lmcache_mp_connector"))
    assert "self.cache_salt: str = request.cache_salt or ''" in lmcache
    assert "self.request_trackers: dict[str, LMCacheMPRequestTracker] = {}" in lmcache
    assert "min_available_blocks - tracker.num_stored_blocks" in lmcache
    for unsalted in ("lmcache_integration.vllm_v1_adapter", "hf3fs.hf3fs_connector"):
        assert "cache_salt" not in ast.unparse(tree_of(f"{folder}.{unsalted}"))


def test_the_tier_of_a_request_is_found():
    assert {"cache_salt", "sampling_params"} <= set(EngineCoreRequest.__struct_fields__)
    assert "extra_args" in SamplingParams.__struct_fields__
    assert isinstance(InputBatch.req_ids, property)
    assert "sampling_params" in CachedRequestState.__dataclass_fields__
    assert "self.requests: dict[str, CachedRequestState]" in source(
        gpu_model_runner.GPUModelRunner.__init__
    )
    for request in (ChatCompletionRequest, CompletionRequest):
        assert "vllm_xargs" in request.model_fields
        assert "= self.vllm_xargs if self.vllm_xargs else {}" in source(request.to_sampling_params)


def test_stages_get_steps_and_calls_in_one_order():
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    call = source(MultiprocExecutor.collective_rpc)
    assert "self.rpc_broadcast_mq.enqueue(" in call
    assert "self.collective_rpc(" in source(MultiprocExecutor.execute_model)


def test_sleep_gives_away_what_was_made_beside_the_weights():
    worker = gpu_worker.Worker
    assert parameters(worker.sleep) == ["self", "level"]
    assert parameters(worker.wake_up) == ["self", "tags"]


def test_rpc_reaches_methods_of_the_worker_by_name():
    assert "getattr(self.worker, attr)" in source(worker_base.WorkerWrapperBase.__getattr__)


# --- expert parallelism on a CPU ------------------------------------------------------------------


def test_cpu_experts_still_ignore_the_expert_map():
    """If one of the first two fails, vLLM has learned it: remove the patch."""
    from vllm.distributed.device_communicators.base_device_communicator import (
        DeviceCommunicatorBase,
    )
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    assert source(CPUUnquantizedExperts.apply).count("expert_map") == 1
    for name in ("all_gatherv", "reduce_scatterv"):
        stock = original(getattr(CpuCommunicator, name))
        assert stock is getattr(DeviceCommunicatorBase, name)
        assert parameters(stock) == ["self", "input_", "dim", "sizes"]
    kernel = modular_kernel.FusedMoEKernelModularImpl._fused_experts
    call = source(kernel).partition("self.fused_experts.apply(")[2].partition(")")[0]
    for name in ("output", "hidden_states", "topk_weights", "topk_ids", "expert_map"):
        assert f"{name}=" in call


def test_cpu_layers_are_called_through_a_replaceable_entry():
    runner = moe_runner.MoERunner
    assert "self._forward_entry = self._select_forward()" in source(runner.__init__)
    assert "result = self._forward_entry(" in source(runner.forward)
    assert "torch.ops.vllm.moe_forward_shared" in source(runner._select_forward)


def test_kernels_are_made_of_a_back_end_and_experts():
    """`cpu/dispatch.py` puts its own back end beside the same experts."""
    from vllm.model_executor.layers.fused_moe import all2all_utils, modular_kernel

    kernel = modular_kernel.FusedMoEKernel
    assert parameters(kernel.__init__) == ["self", "prepare_finalize", "fused_experts"]
    implementation = source(modular_kernel.FusedMoEKernelModularImpl)
    assert "self.prepare_finalize.prepare(" in implementation
    assert "self.prepare_finalize.finalize(" in implementation
    assert "if M_full == 0:" in implementation  # a rank that no row reaches
    back_end = modular_kernel.FusedMoEPrepareAndFinalizeModular
    assert parameters(back_end.prepare) == [
        "self",
        "a1",
        "topk_weights",
        "topk_ids",
        "num_experts",
        "expert_map",
        "apply_router_weight_on_input",
        "quant_config",
        "defer_input_quant",
    ]
    assert parameters(back_end.finalize) == [
        "self",
        "output",
        "fused_expert_output",
        "topk_weights",
        "topk_ids",
        "apply_router_weight_on_input",
        "weight_and_reduce_impl",
    ]
    made = source(all2all_utils.maybe_make_prepare_finalize)
    assert "moe.use_ag_rs_all2all_kernels and allow_new_interface" in made


def test_a_pass_runs_on_all_ranks_or_on_none():
    """What the exchange of `cpu/union.py` counts on: passes are agreed on before layers are."""
    runner = gpu_model_runner.GPUModelRunner
    agree = "self._determine_batch_execution_and_padding("
    for function, forward in (
        (runner.execute_model, "self._model_forward("),
        (runner._dummy_run, "self.model("),
    ):
        assert source(function).index(agree) < source(function).index(forward)
    assert "coordinate_batch_across_dp(" in source(runner._determine_batch_execution_and_padding)
    assert "self.model_runner._dummy_run(" in source(gpu_worker.Worker.execute_dummy_batch)
    assert "self._dummy_run(" in source(runner.profile_run)


def test_observers_are_installed_once_and_call_the_original():
    from sere_ray.engine.plugin import register

    register()
    first = VllmConfig.__post_init__
    register()
    assert VllmConfig.__post_init__ is first
    assert not hasattr(original(first), _MARK)


# --- what the GPU back end patches: read, not imported, as parts need Triton ----------------------


def text_of(module):
    return Path(find_spec("vllm").origin).parent.joinpath(*module.split("."))


def tree_of(module):
    return ast.parse(text_of(module).with_suffix(".py").read_text())


def function_of(module, name):
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node, ast.unparse(node)
    raise AssertionError(f"{module} has no function {name}")


def arguments_of(node):
    return [argument.arg for argument in node.args.args]


def test_v2_runner_prepares_real_batches_before_every_launch():
    runner = "v1.worker.gpu.model_runner"
    node, body = function_of(runner, "execute_model")
    assert arguments_of(node)[:4] == [
        "self",
        "scheduler_output",
        "intermediate_tensors",
        "dummy_run",
    ]
    prepared, replayed = "self.prepare_inputs(", "self.cudagraph_manager.run_fullgraph("
    assert body.index("if not dummy_run:") < body.index(prepared) < body.index(replayed)
    assert body.count(prepared) == 1
    _, body = function_of(runner, "prepare_inputs")
    for name in ("req_ids", "num_reqs", "query_start_loc_np", "is_prefilling_np"):
        assert f"{name}=" in body


def test_v2_runner_adds_requests_with_their_sampling_parameters():
    node, body = function_of("v1.worker.gpu.model_runner", "add_requests")
    assert arguments_of(node) == ["self", "scheduler_output"]
    for part in ("in scheduler_output.scheduled_new_reqs", "new_req_data.sampling_params"):
        assert part in body
    assert "self.req_states.req_id_to_index[req_id]" in body
    _, body = function_of("v1.worker.gpu.model_runner", "execute_model")
    assert body.index("self.add_requests(scheduler_output)") < body.index("self.prepare_inputs(")


def test_warm_up_requests_of_the_v2_runner_are_recognised():
    _, body = function_of("v1.worker.gpu.warmup", "_warmup_kernels")
    assert "f'_warmup_{i}_'" in body
    assert "_v2_mixed_warmup" in ast.unparse(tree_of("v1.worker.gpu.warmup"))


def test_triton_experts_sort_by_a_module_global_name():
    module = "model_executor.layers.fused_moe.experts.triton_moe"
    experts = next(
        node
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ClassDef) and node.name == "TritonExperts"
    )
    body = ast.unparse(experts)
    sort = " _prepare_expert_assignment("
    assert body.count(sort) == 1
    assert 0 < body.index(sort) < body.index("invoke_fused_moe_triton_kernel(")
    fused = "model_executor.layers.fused_moe.fused_moe"
    node, _ = function_of(fused, "_prepare_expert_assignment")
    assert arguments_of(node)[:2] == ["topk_ids", "config"]


def test_marlin_experts_sort_by_a_module_global_name():
    module = "model_executor.layers.fused_moe.experts.marlin_moe"
    _, body = function_of(module, "fused_marlin_moe")
    sort = " moe_align_block_size("
    assert body.count(sort) == 1
    assert body.index(sort) < body.index("_fused_marlin_moe(", body.index(sort))
    assert "moe_align_block_size(topk_ids, block_size_m, global_num_experts, expert_map" in body
    assert "sorted_token_ids, expert_ids, num_tokens_post_padded = moe_align_block_size" in body


def test_plain_gate_is_a_softmax_and_a_top_k():
    """What `route_and_align` computes instead."""
    folder = "model_executor.layers.fused_moe.router"
    node, body = function_of(f"{folder}.fused_topk_router", "_compute_routing")
    assert arguments_of(node)[:4] == ["self", "hidden_states", "router_logits", "indices_type"]
    assert "renormalize=self.renormalize" in body
    _, body = function_of(f"{folder}.fused_topk_router", "vllm_topk_softmax")
    assert "is_padding=_get_padding_mask(topk_indices.shape[0])" in body
    _, body = function_of(f"{folder}.base_router", "_select_experts")
    assert "self._compute_routing(hidden_states, router_logits, topk_indices_dtype" in body


def test_routing_without_parallelism_hands_ids_on_as_they_are():
    """`OwnRows.defer` counts on the experts sorting the tensor that the router returned."""
    _, prepare = function_of("model_executor.layers.fused_moe.prepare_finalize.no_dp_ep", "prepare")
    assert "return (a1q, a1q_scale, None, None, None)" in prepare
    kernel = "model_executor.layers.fused_moe.modular_kernel"
    _, body = function_of(kernel, "_prepare")
    assert "topk_ids = topk_ids if _expert_topk_ids is None else _expert_topk_ids" in body


# --- expert parallelism on a GPU ------------------------------------------------------------------


def test_a_pass_of_v2_is_agreed_on_by_one_sum_after_its_requests_are_known():
    """What `gpu/union_patches.py` counts on: kinds, then the sum, then everything of the pass."""
    from vllm.v1.worker.gpu import dp_utils, model_runner

    runner = model_runner.GPUModelRunner
    assert parameters(runner.gather_batch_req_state) == ["self", "scheduler_output", "dummy_run"]
    run = source(runner.execute_model)
    steps = [
        "self.gather_batch_req_state(",
        "dispatch_cg_and_sync_dp(",
        "self.prepare_inputs(",
        "self.cudagraph_manager.run_fullgraph(",
    ]
    assert [run.index(step) for step in steps] == sorted(run.index(step) for step in steps)
    assert run.count("dispatch_cg_and_sync_dp(") == 1
    gather = source(runner.gather_batch_req_state)
    for name in ("req_ids=", "num_scheduled_tokens=", "is_prefilling_np="):
        assert name in gather
    assert "self.parallel_config = vllm_config.parallel_config" in source(runner.__init__)
    assert "parallel_config=self.parallel_config," in run
    dispatch = source(dp_utils.dispatch_cg_and_sync_dp)
    assert (
        "parallel_config=parallel_config,"
        in dispatch.partition("return sync_cudagraph_and_dp_padding(")[2]
    )
    sync = source(dp_utils.sync_cudagraph_and_dp_padding)
    if IS_033:
        assert not hasattr(dp_utils, "dist")
        assert sync.count("get_dp_group()") == 1
        assert "get_dp_group().cpu_all_reduce_(tensor)" in sync
    else:
        assert sync.count("dist.") == 1
        assert "dist.all_reduce(tensor, group=group)" in sync
    assert 'dtype=torch.int32, device="cpu"' in sync


def test_ids_of_all_ranks_are_gathered_in_rank_order_and_handed_to_the_experts():
    from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.prepare_finalize import naive_dp_ep

    prepare = naive_dp_ep.MoEPrepareAndFinalizeNaiveDPEPModular.prepare
    assert "return a1q, a1q_scale, None, topk_ids, topk_weights" in source(prepare)
    assert "get_ep_group().dispatch(" in source(prepare)
    assert "return get_dp_group()" in source(AgRsAll2AllManager._get_comm_group)
    assert "self.prepare_finalize.prepare(" in source(
        modular_kernel.FusedMoEKernelModularImpl._prepare
    )
    apply = source(TritonExperts.apply)
    assert "a2_scale_is_global = (" in apply
    assert "ignore_invalid_experts=skip_invalid," in apply
    if IS_033:
        assert "self._finalize_expert_output(" in apply
        end = source(TritonExperts._finalize_expert_output)
        assert "self.moe_sum(expert_output, output, topk_ids, expert_map)" in end
        # A hook takes the place of that sum; `_is_plain` leaves such experts to vLLM.
        assert "self.post_gemm2_hook is not None" in source(TritonExperts._uses_post_gemm2_hook)
    else:
        assert "self.moe_sum(intermediate_cache3, output, topk_ids, expert_map)" in apply
