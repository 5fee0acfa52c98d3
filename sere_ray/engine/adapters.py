"""LoRA: adapters on attention serve, those that reach into a mixture of experts are refused.

An adapter on a gate chooses other experts than those that were compared, one on experts makes them
others. vLLM wraps what ``lora_target_modules`` names as it loads the model, and drops whatever else
an adapter holds without a word; so adapters are looked at as they are loaded.
"""

from collections.abc import Callable, Iterable
from typing import Any

from sere_ray.engine.states import find_state
from sere_ray.util.errors import UnsupportedError


def load_lora_model(
    original: Callable[..., Any], runner: Any, model: Any, vllm_config: Any, *args: Any, **kw: Any
) -> Any:
    """``LoRAModelRunnerMixin.load_lora_model``: vLLM wraps modules of the model there.

    Raises:
        UnsupportedError: one of a block with experts is among them.
    """
    wrapped = original(runner, model, vllm_config, *args, **kw)
    state = find_state(vllm_config)
    if state is not None:
        manager = runner.lora_manager
        manager.sere_blocks = [r.layer_name.rpartition(".")[0] for r in state.attached.values()]
        names = _inside(manager._adapter_manager.modules, manager.sere_blocks)
        if names:
            raise UnsupportedError(
                f"sere: lora_target_modules = {vllm_config.lora_config.target_modules}: names "
                f"{names[0]}, of a block with experts, which similarity was measured without; name "
                "modules of attention alone, such as q_proj, k_proj, v_proj, o_proj"
            )
    return wrapped


def load_adapter(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """``WorkerLoRAManager._load_adapter``: reads an adapter, the first time it is asked for.

    Raises:
        UnsupportedError: it changes a gate or experts.
    """
    adapter = original(manager, request)
    names = _inside([*adapter.loras, *adapter.modules_to_save], getattr(manager, "sere_blocks", []))
    if names:
        raise UnsupportedError(
            f"sere: adapter {request.lora_name!r} ({request.lora_path}) changes {names[0]} and "
            f"{len(names) - 1} more modules of blocks with experts, which similarity was measured "
            "without; merge it into the model and calibrate that, or serve an adapter on attention "
            "alone"
        )
    return adapter


def _inside(names: Iterable[str], blocks: Iterable[str]) -> list[str]:
    """Those of the modules that are in a block."""
    starts = tuple(f"{block}." for block in blocks)
    return [name for name in names if name.startswith(starts)] if starts else []
