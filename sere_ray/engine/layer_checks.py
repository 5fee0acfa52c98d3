"""Refusals of a single layer, as it is attached and once its weights are loaded: whatever would
make re-routed answers wrong without a word."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sere_ray.artifact.gates import find_gate, gate_weight
from sere_ray.engine.back_end import expert_kernel
from sere_ray.engine.state import EngineState
from sere_ray.util.errors import UnsupportedError


class Takes(NamedTuple):
    """What an expert kernel was shown to be right for (docs/results/back-ends-h200.json)."""

    repeats: bool
    """Rows that name an expert twice, as ``sere`` makes them. Stock routing never does, so kernels
    which return wrong rows then pass every test of stock answers."""
    dropped: bool
    """Ids of -1, also where all experts are here: such slots are left out."""


ALLOWED = {
    "cpu": {
        "CPUUnquantizedExperts": Takes(repeats=True, dropped=False),
        "X86CPUUnquantizedExperts": Takes(repeats=True, dropped=False),
    },
    "cuda": {
        "TritonExperts": Takes(repeats=True, dropped=False),
        "MarlinExperts": Takes(repeats=True, dropped=False),
        "UnfusedOAITritonExperts": Takes(repeats=False, dropped=True),
    },
}
"""Expert kernels by vLLM's name of the device; all others are refused."""
_REMEDY = {
    "cpu": "serve an unquantised model (bf16 or float32)",
    "cuda": "start with --moe-backend triton; INT4: marlin; MXFP4: marlin or triton_unfused",
}


def check_layer(runner: Any, attached: Iterable[int], top_k: int, num_experts: int) -> None:
    """Refuse a layer whose rows, choices or experts are not what the rule takes them for.

    Args:
        runner: vLLM's ``MoERunner``.
        attached: decoder layers that have a runner already.
        top_k: K of the model's configuration.
        num_experts: E of it.

    Raises:
        UnsupportedError: names the layer and what it has.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    config, experts = runner.moe_config, type(runner.routed_experts)
    found = config.experts_per_token, config.num_logical_experts
    refused = [
        (
            runner.layer_id in set(attached),
            f"is the second one of decoder layer {runner.layer_id}: the rows of the layer are "
            "split, so that row kinds would be those of other rows",
        ),
        (
            found != (top_k, num_experts),
            f"chooses {found[0]} of {found[1]} experts, the model's configuration says {top_k} of "
            f"{num_experts}",
        ),
        (
            experts.forward_modular is not RoutedExperts.forward_modular,
            f"has its own {experts.__name__}.forward_modular, which may read ids before they are "
            "re-routed",
        ),
    ]
    for is_refused, what in refused:
        if is_refused:
            raise UnsupportedError(
                f"sere: layer {runner.layer_name!r} {what}; this model cannot be re-routed: remove "
                "the 'sere' key"
            )


def check_has_layer(state: EngineState, layer: int) -> None:
    """Refuse files that say nothing of a layer with experts.

    Args:
        state: of the engine.
        layer: decoder layer index.

    Raises:
        ArtifactError: names the file and the layer.
    """
    policy, artifact, masks = state.policy, state.artifact, state.masks
    if artifact is not None:
        artifact.matrix(layer, path=str(policy.similarity))
    if masks is not None and layer not in masks.layers:
        masks.check_same(str(policy.masks), f"mask of layer {layer}", "none", "experts there")


def check_input(runner: Any, mask: Tensor) -> None:
    """Refuse masks where what goes to the experts is not what they were trained on.

    Args:
        runner: vLLM's ``MoERunner``.
        mask: ``[E, H]``.

    Raises:
        UnsupportedError: names the layer.
    """
    width = runner.moe_config.hidden_dim
    if runner.routed_input_transform is not None or width != mask.shape[1]:
        raise UnsupportedError(
            f"sere.masks: layer {runner.layer_name!r} gives its experts transformed or padded "
            f"rows of {width} numbers, the masks take {mask.shape[1]}; leave masks out"
        )


def check_routes_outside_kernel(runner: Any) -> None:
    """Refuse a layer whose kernel chooses the experts itself: there is nothing to re-route.

    Raises:
        UnsupportedError: names the layer and the back end that works.
    """
    if runner.is_monolithic:
        raise UnsupportedError(
            f"sere: layer {runner.layer_name!r} chooses its experts inside the kernel "
            f"{_name(expert_kernel(runner))}; choose a modular back end (on GPU `--moe-backend "
            "triton`, for MXFP4 `marlin`; on CPU an unquantised model), or remove the 'sere' key"
        )


def check_expert_kernel(runner: Any, device: str) -> bool:
    """Refuse experts that were not shown right for what a rule makes of rows.

    Called as a layer is built, and again when vLLM has made its kernel.

    Args:
        runner: vLLM's ``MoERunner``.
        device: vLLM's name of its type.

    Returns:
        Whether slots have to be merged that name the same expert of a row.

    Raises:
        UnsupportedError: names the layer, the kernel and the back end that works.
    """
    names = kernel_names(runner)
    for name in names:
        if name not in ALLOWED[device]:
            raise UnsupportedError(
                f"sere: layer {runner.layer_name!r} computes its experts with {name}, which was "
                "not shown to be right where a row names an expert twice; shown right: "
                f"{', '.join(ALLOWED[device])}; {_REMEDY[device]}, or remove the 'sere' key"
            )
    kernels = [ALLOWED[device][name] for name in names]
    merges = not all(kernel.repeats for kernel in kernels)
    assert not merges or all(kernel.dropped for kernel in kernels)
    return merges


def kernel_names(runner: Any) -> list[str]:
    """Names of the classes that may compute a layer: of a pair that chooses by batch, both.

    Args:
        runner: vLLM's ``MoERunner``.
    """
    made = getattr(runner.routed_experts.quant_method, "moe_kernel", None)
    kernel = expert_kernel(runner) if made is None else type(made.fused_experts)
    classes = getattr(kernel, "get_clses", lambda: (kernel,))()
    return [_name(of_class) for of_class in classes]


def _name(kernel: Any) -> str:
    return str(getattr(kernel, "__name__", type(kernel).__name__))


def check_gate(runner: Any, model: nn.Module) -> Tensor:
    """Find the gate of a layer, for comparison with the one that was calibrated.

    Args:
        runner: vLLM's ``MoERunner``, its weights loaded.
        model: that holds it.

    Returns:
        Its weight, ``[E, H]``.

    Raises:
        UnsupportedError: there is none under a known name, or it is quantised, or it scales what
            experts give by a number of theirs, which a stand-in would get.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    block = modules.get(runner.layer_name.rpartition(".")[0], nn.Module())
    gate = find_gate(block) if runner.gate is None else runner.gate
    weight = None if gate is None else gate_weight(gate)
    if gate is None or weight is None:
        raise UnsupportedError(
            f"sere: layer {runner.layer_name!r} has no module 'gate' or 'router' with one matrix "
            "beside its experts, so the artifact cannot be checked; this model is not supported: "
            "remove the 'sere' key"
        )
    if hasattr(gate, "per_expert_scale"):
        raise UnsupportedError(
            f"sere: the gate of layer {runner.layer_name!r} scales each output by a number "
            "of its expert (per_expert_scale), which a stand-in would get in its place; this "
            "model cannot be re-routed: remove the 'sere' key"
        )
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UnsupportedError(
            f"sere: the gate of layer {runner.layer_name!r} is quantised to {weight.dtype}, so the "
            "artifact cannot be checked; leave gates out of the quantisation, as published "
            "quantised checkpoints do"
        )
    return weight


def check_something_attached(attached: Iterable[int], architecture: str, backend: str) -> None:
    """Refuse a model none of whose layers the rule reaches.

    Raises:
        UnsupportedError: names the model and the back end.
    """
    if not list(attached):
        raise UnsupportedError(
            f"sere: {architecture} has built no layer that can be re-routed (moe_backend = "
            f"{backend!r}): its experts are computed by code of its own, so nothing would be "
            "re-routed; choose another --moe-backend, or remove the 'sere' key"
        )


def check_shards(runner: Any, shards: int) -> None:
    """Refuse a layer whose rows are cut into other shards than those of layers before it.

    Args:
        runner: vLLM's ``MoERunner``.
        shards: of the first layer, over the tensor-parallel workers of a data-parallel rank.

    Raises:
        UnsupportedError: names the layer and both numbers.
    """
    found = runner.moe_config.sp_size
    if found != shards:
        raise UnsupportedError(
            f"sere: layer {runner.layer_name!r} cuts the rows of a data-parallel rank into {found} "
            f"shards, layers before it into {shards}: row kinds would be those of other rows; use "
            "tensor_parallel_size = 1 or data_parallel_size = 1"
        )


def check_rows(layer: int, rows: int, rows_of_step: int) -> None:
    """Refuse a layer that gets fewer rows than the step has: their kinds would be those of others.

    Raises:
        UnsupportedError: names the layer and both numbers.
    """
    if rows < rows_of_step:
        raise UnsupportedError(
            f"sere: decoder layer {layer} was given {rows} rows of a step of {rows_of_step}, so "
            "row kinds would be those of other rows; this model cannot be re-routed: remove the "
            "'sere' key"
        )
