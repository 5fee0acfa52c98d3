"""Fails when vLLM changes under a patch of `sere_ray/engine/seam.py`.

Not guarded: what the patched functions compute. The engine tests show that.
"""

import inspect

from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.model_executor.layers.fused_moe.runner import moe_runner
from vllm.model_executor.model_loader import base_loader
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker import gpu_model_runner, worker_base
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_input_batch import InputBatch

from sere_ray.engine import seam


def original(function):
    return getattr(function, seam._MARK, function)


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


def test_step_seam():
    runner = gpu_model_runner.GPUModelRunner
    assert "self._model_forward(" in source(runner.execute_model)
    assert "self._model_forward(" not in source(runner._dummy_run)
    assert "_model_forward" not in vars(CPUModelRunner)
    fields = ("num_tokens_no_spec", "num_computed_tokens_cpu", "num_prompt_tokens")
    batch = source(InputBatch.__init__) + source(InputBatch)
    for name in fields:
        assert f"self.{name}" in batch
    assert "self.query_start_loc.np[" in source(runner._prepare_inputs)


def test_weights_are_processed_by_module_global_name_after_loading():
    loader = source(base_loader.BaseModelLoader.load_model)
    load = loader.index("self.load_weights(")
    assert load < loader.index("process_weights_after_loading(model, model_config, target_device)")


def test_kernels_are_rebound_by_module_global_name():
    from vllm.triton_utils import dispatcher

    assert "    _rebind_kernels(" in source(dispatcher.register_kernels)
    assert "list(sys.modules.values())" in source(dispatcher._rebind_kernels)


def test_engine_core_seams():
    assert parameters(EngineCore.preprocess_add_request) == ["self", "request"]
    assert parameters(EngineCore.collective_rpc)[:2] == ["self", "method"]


def test_rpc_reaches_methods_of_the_worker_by_name():
    assert "getattr(self.worker, attr)" in source(worker_base.WorkerWrapperBase.__getattr__)


def test_observers_are_installed_once_and_call_the_original():
    from sere_ray.engine.plugin import register

    register()
    first = VllmConfig.__post_init__
    register()
    assert VllmConfig.__post_init__ is first
    assert not hasattr(original(first), seam._MARK)
