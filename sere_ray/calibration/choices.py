"""Stand between the gates of a Hugging Face model and their experts while it runs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sere_ray.calibration.collect import find_moe_layers
from sere_ray.rules import Choice


@contextmanager
def changed_choices(
    model: PreTrainedModel,
    change: Callable[[int, Tensor, Tensor, Tensor], Choice],
    after: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Let ``change(layer, hidden_states, topk_ids, topk_weights)`` stand between every gate and
    its experts, and ``after(layer, hidden_states, output)`` behind these."""

    def hook(layer: int) -> Any:
        def change_choice(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden_states, topk_ids, topk_weights = arguments
            return (hidden_states, *change(layer, hidden_states, topk_ids, topk_weights))

        return change_choice

    def behind(layer: int) -> Any:
        def change_output(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Any:
            return output if after is None else after(layer, arguments[0], output)

        return change_output

    with ExitStack() as stack:
        for index, layer in find_moe_layers(model).items():
            handle = layer.experts.register_forward_pre_hook(hook(index))
            stack.callback(handle.remove)
            handle = layer.experts.register_forward_hook(behind(index))
            stack.callback(handle.remove)
        yield
