"""What an engine needs of a platform; ``cpu/back_end.py`` and ``gpu/back_end.py`` have it."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from sere_ray.engine.checks import Checked
from sere_ray.engine.state import EngineState

Routing = tuple[Tensor, Tensor]
"""``topk_weights`` and ``topk_ids``, ``[T, K]`` each, as vLLM orders them."""
Wrap = Callable[[Any, str, Callable[..., Any]], None]
"""Replaces ``owner.name`` by ``wrapper(original, *args, **kwargs)``, once."""


class BackEnd(Protocol):
    """Re-routing on one platform, for engines of one rank and of several."""

    def make_state(self, vllm_config: Any, checked: Checked, runner: Any) -> EngineState:
        """The state of an engine in this process.

        Args:
            vllm_config: vLLM's complete configuration.
            checked: what its ``sere`` key holds and names.
            runner: vLLM's ``MoERunner`` of the first layer that is built.
        """
        ...

    def install(self, wrap: Wrap, vllm_config: Any) -> None:
        """Put the platform's patches of vLLM in place; calling it again does nothing."""
        ...

    def check_experts(self, state: EngineState, runner: Any) -> None:
        """Refuse a layer's experts; called as it is built, and again when its kernel is made.

        Args:
            state: from :meth:`make_state`.
            runner: vLLM's ``MoERunner``.

        Raises:
            UnsupportedError: see :func:`sere_ray.engine.layer_checks.check_expert_kernel`.
        """
        ...

    def attach(self, state: EngineState, runner: Any, vllm_config: Any) -> None:
        """Make one layer ready, before its router is changed.

        Args:
            state: from :meth:`make_state`.
            runner: vLLM's ``MoERunner``; its router already knows its layer, ``sere_layer``.
            vllm_config: vLLM's complete configuration.

        Raises:
            UnsupportedError: the layer's gate or kernel cannot be re-routed under this policy.
        """
        ...

    @staticmethod
    def route(
        router: Any,
        original: Callable[..., Routing],
        hidden_states: Tensor,
        router_logits: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Routing:
        """What a layer's router answers in the place of the gate's own choice.

        A plain function, as Dynamo traces it where a layer is part of a compiled graph.

        Args:
            router: vLLM's, of an attached layer.
            original: gives the gate's choice, of all arguments that follow.
            hidden_states: ``[T, H]``.
            router_logits: ``[T, E]``.
            args: as vLLM passes them on.
            kwargs: as vLLM passes them on.
        """
        ...


def expert_kernel(runner: Any) -> Any:
    """What computes the experts of a layer: the class of the kernel, or the method itself."""
    method = runner.routed_experts.quant_method
    return getattr(method, "experts_cls", None) or method
