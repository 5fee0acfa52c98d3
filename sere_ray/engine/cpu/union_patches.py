"""Where vLLM is changed for the union over data-parallel ranks of a CPU engine.

Ledger, as in ``seam.py``:

=====================================  ==========================================================
target                                 what, why, remove when
=====================================  ==========================================================
GPUModelRunner._dummy_run              Take part in the exchange. Why: a dummy pass calls the
                                       model directly, past ``_model_forward``. Remove: as for
                                       GPUModelRunner._model_forward.
=====================================  ==========================================================
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.dispatch import Greeting
from sere_ray.engine.cpu.dispatch import group_timeout
from sere_ray.engine.cpu.state import CpuState
from sere_ray.engine.cpu.union import UnionCpuState
from sere_ray.engine.state import Wrap, find_state
from sere_ray.policy.policy import Policy, Startup


def install(wrap: Wrap) -> None:
    """Put the patch in place; calling it again does nothing."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def run_dummy(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
        state = find_state(runner.vllm_config)
        if not isinstance(state, UnionCpuState):
            return original(runner, *args, **kwargs)
        with state.step(np.zeros(0, dtype=np.int8)):  # all rows are padding
            return original(runner, *args, **kwargs)

    wrap(GPUModelRunner, "_dummy_run", run_dummy)


def make_state(
    vllm_config: Any,
    policy: Policy,
    startup: Startup,
    artifact: SimilarityArtifact,
    top_k: int,
    max_rows: int,
) -> CpuState:
    """The state of a CPU engine: with tensor parallelism alone every rank sees every row."""
    if vllm_config.parallel_config.data_parallel_size == 1:
        return CpuState(policy, artifact, top_k, max_rows, startup=startup)
    from vllm.distributed import get_ep_group

    ranks = get_ep_group()
    greeting = Greeting(ranks.cpu_group, group_timeout(vllm_config))
    group = ranks.device_group
    return UnionCpuState(policy, artifact, top_k, max_rows, group, greeting, startup=startup)
