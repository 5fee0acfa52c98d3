"""Checks of a model whose weights are there: its layers, its gates, its expert kernels."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from sere_ray.engine.back_ends import BACK_ENDS
from sere_ray.engine.layer_checks import check_gate
from sere_ray.engine.state import EngineState
from sere_ray.engine.states import find_state, states_of_layers
from sere_ray.util.errors import UnsupportedError


def check_loaded(
    original: Callable[..., Any], model: Any, model_config: Any, *args: Any, **kwargs: Any
) -> None:
    """Around vLLM's work on loaded weights: of this model, of these experts, or not at all.

    Raises:
        ArtifactError: the artifact is of other layers or gates.
        UnsupportedError: a layer's expert kernel was not shown right.
    """
    states = states_of_layers(model.modules())
    for state in states:
        # That files have every layer is checked as it is built.
        _check_layers(state, [*state.attached, *_elsewhere(model_config, state.layers)])
        _check_router_weights(state, model)
    original(model, model_config, *args, **kwargs)
    for state in states:
        back_end = BACK_ENDS["cuda" if state.kind["on_gpu"] else "cpu"]
        for runner in state.attached.values():
            back_end.check_experts(state, runner)
        state.loaded()


def _elsewhere(model_config: Any, layers: Iterable[int]) -> list[int]:
    """Layers that other pipeline stages hold, which check them.

    Args:
        model_config: vLLM's.
        layers: decoder layer indices.
    """
    from vllm.config import get_current_vllm_config

    parallel = get_current_vllm_config().parallel_config
    if parallel.pipeline_parallel_size == 1:
        return []
    first, end = model_config.get_layers_start_end_indices(parallel)
    return [layer for layer in layers if not first <= layer < end]


def _check_layers(state: EngineState, having: Collection[int]) -> None:
    """Refuse files that say something of layers without experts."""
    if state.artifact is not None:
        state.artifact.check_layers(
            having,
            path=str(state.policy.similarity),
            but="those of the model have no experts",
        )
    if state.masks is not None:
        surplus = [layer for layer in state.masks.layers if layer not in having]
        if surplus:
            state.masks.check_same(str(state.policy.masks), "layers", surplus, "no experts there")


def _check_router_weights(state: EngineState, model: Any) -> None:
    """Compare each gate with the one that was calibrated, or that masks were trained beside."""
    policy, artifact, masks = state.policy, state.artifact, state.masks
    if artifact is not None and artifact.metadata.synthetic:
        artifact = None
    if masks is not None and masks.metadata.synthetic:
        masks = None
    if artifact is None and masks is None:
        return
    for layer, runner in state.attached.items():
        weight = check_gate(runner, model)
        if artifact is not None:
            artifact.check_router(layer, weight, path=str(policy.similarity))
        if masks is not None:
            masks.check_layer(layer, weight, path=str(policy.masks))


def refuse_other_weights(original: Callable[..., Any], worker: Any, *args: Any, **kw: Any) -> Any:
    """Instead of ``Worker.reload_weights``.

    Raises:
        UnsupportedError: this engine re-routes.
    """
    if find_state(worker.vllm_config) is not None:
        raise UnsupportedError(
            "sere: reload_weights: gates may change after the artifact was checked; calibrate the "
            "new weights and restart the engine with their artifact"
        )
    return original(worker, *args, **kw)
