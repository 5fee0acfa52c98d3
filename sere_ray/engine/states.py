"""The state of each engine in this process, found by its configuration."""

from collections.abc import Iterable
from typing import Any

from sere_ray.engine.state import EngineState

_states: dict[int, tuple[Any, EngineState]] = {}
"""By id() of an engine's ParallelConfig, which is kept too: an id is free again once its object is.
Of all parts of a configuration it is the one that vLLM also hands to the agreement of ranks."""


def add_state(vllm_config: Any, state: EngineState) -> None:
    """Keep the state of the engine with this configuration."""
    parallel = vllm_config.parallel_config
    _states[id(parallel)] = parallel, state


def find_state(vllm_config: Any) -> EngineState | None:
    """The state of the engine with this configuration; None without the ``sere`` key."""
    return state_of_ranks(vllm_config.parallel_config)


def state_of_ranks(parallel_config: Any) -> EngineState | None:
    """The state of the engine whose configuration has this part; None without the key."""
    return _states.get(id(parallel_config), (None, None))[1]


def states_of_layers(modules: Iterable[Any]) -> list[EngineState]:
    """The engines that have attached one of these modules, one engine for a whole model."""
    found = set(modules)
    return [state for _, state in _states.values() if found.intersection(state.attached.values())]
