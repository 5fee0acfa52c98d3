"""What other rooms need of vLLM beyond its public names: each with why, and when it can go.

Public are the names of ``vllm`` itself and ``vllm.sampling_params``. vLLM is imported when a
function is called: a process that only builds or routes does not have it.

==========================  =====================================================================
function                    why, remove when
==========================  =====================================================================
server_arguments            Ray takes arguments of vLLM's HTTP server among those of an engine, and
                            a mistyped one is refused before. Remove: vLLM exports them.
compute_in_engine_process   Ray's wrapper sets an executor that starts a worker process, also for
                            one worker. Remove: Ray leaves that choice to vLLM.
workspace_manager           Two engines of one process (step-time benchmark): the first one's
                            graphs write to memory that the second frees. Remove: vLLM keeps one
                            manager an engine.
expert_kernel               A result says which kernel vLLM chose for a model's experts. Remove:
                            vLLM says so.
fill_dummy_weights          Random weights of a quantised model are drawn before vLLM packs them for
                            its kernels. Remove: its dummy weights keep rows apart.
balanced_placement          Where vLLM's load balancer puts copies of experts is simulated.
                            Remove: its policy is a public name.
forget_environment          vLLM keeps what it read of the environment, and each engine of one
                            process needs a port of its own. Remove: the port is an argument.
==========================  =====================================================================
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def server_arguments() -> list[str]:
    """Names of the arguments of vLLM's HTTP server, such as ``enable_prompt_tokens_details``."""
    from dataclasses import fields

    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    return [field.name for field in fields(FrontendArgs)]


def compute_in_engine_process(engine_config: Any) -> None:
    """Let an engine of one worker compute in its own process; one of several is left as it is.

    Args:
        engine_config: a ``VllmConfig`` before its engine starts; changed in place.
    """
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    parallel = engine_config.parallel_config
    if parallel.world_size == 1:
        parallel.distributed_executor_backend = UniProcExecutor


def workspace_manager() -> Any:
    """The scratch memory of this process's newest engine: hold it as long as that engine."""
    from vllm.v1.worker import workspace

    return workspace._manager


def expert_kernel(model: Any) -> str:
    """What computes the experts of a model's first layer that has some, by vLLM's name.

    Args:
        model: vLLM's, on a worker.
    """
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    from sere_ray.engine.layer_checks import kernel_names

    runner = next(module for module in model.modules() if isinstance(module, MoERunner))
    return " or ".join(kernel_names(runner))


def fill_dummy_weights(fill: "Callable[[nn.Module], object]") -> None:
    """Let ``load_format="dummy"`` of this process give each model to a function, once.

    Args:
        fill: changes the weights in place, which are as a checkpoint has them.
    """
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader, register_model_loader

    dummy: Any = type(get_model_loader(LoadConfig(load_format="dummy")))
    if hasattr(dummy, "fills"):
        return

    def load_weights(self: Any, model: "nn.Module", model_config: Any) -> None:
        dummy.load_weights(self, model, model_config)
        fill(model)

    members = {"load_weights": load_weights, "fills": fill}
    register_model_loader("dummy")(type("FilledModelLoader", (dummy,), members))


def forget_environment() -> None:
    """Let vLLM read environment variables anew, for the next engine of this process."""
    from vllm import envs

    envs.disable_envs_cache()


def balanced_placement(loads: "Tensor", num_physical: int, num_ranks: int) -> "Tensor":
    """Where vLLM's load balancer (EPLB) puts experts and their copies.

    Args:
        loads: ``[layers, E]``, the rows that each expert got.
        num_physical: experts with copies, a multiple of the ranks.
        num_ranks: each holds as many.

    Returns:
        ``[layers, num_physical]`` int64: whose copy each physical expert is; those of a rank follow
        each other.
    """
    from vllm.distributed.eplb.policy import DefaultEplbPolicy

    placed: Tensor = DefaultEplbPolicy.rebalance_experts(
        loads.float(), num_physical, 1, 1, num_ranks
    )
    return placed
