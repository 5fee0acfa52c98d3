"""Without the key vLLM is as it was."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from tests.engine.conftest import generate, prompts, running_engine
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerBase
from vllm.model_executor.model_loader import base_loader

before = GPUModelRunner._model_forward, base_loader.process_weights_after_loading
with running_engine(sys.argv[1]) as engine:
    generate(engine, prompts(2), tokens=4)
    core = engine.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    context = worker.vllm_config.compilation_config.static_forward_context
    routers = {type(m.router).__name__ for m in context.values() if hasattr(m, "router")}
assert routers == {"CPURouter"}, routers
assert before == (GPUModelRunner._model_forward, base_loader.process_weights_after_loading)
assert not hasattr(WorkerBase, "sere_counters")
assert not hasattr(CPUUnquantizedExperts.apply, "_sere_ray_original")
assert "all_gatherv" not in vars(CpuCommunicator)
from sere_ray.engine.states import _states
assert not _states
print("untouched")
"""


@pytest.mark.engine
def test_without_the_key_nothing_but_the_observers_is_patched(checkpoint):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(checkpoint("qwen3_moe"))],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("untouched")
