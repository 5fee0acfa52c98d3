"""The mask router of a layer beside its gate on a GPU: both products of a row in one launch.

Gate and mask router are of one shape and have one input. Their weights lie behind each other,
``[2 E, H]``, and one batched product gives ``[2, T, E]``: the gate's logits, then the masks', each
as contiguous as vLLM and our kernels want them. Captured graphs hold where the weights are, so a
change of the level copies the new mask router to where the former one was.

Here W x is computed in the gate's type, in the specification in float32: where W_e x is near 0 the
two may differ. What follows from the sign is the same.
"""

from typing import Any

import torch
from torch import Tensor

from sere_ray.util.errors import UnsupportedError


class MaskRouter:
    """Takes the gate's place in a layer.

    Args:
        gate: vLLM's module, of which :func:`check_stackable` is true. From now on its weight is a
            part of ``weight``, and calling it also keeps the masks' logits.
    """

    def __init__(self, gate: Any) -> None:
        of_gate: Tensor = gate.weight.data
        self.weight = torch.cat((of_gate, torch.zeros_like(of_gate)))
        """``[2 E, H]``; of the mask router zeros, which mask nothing."""
        self._returns_pair = bool(getattr(gate, "return_bias", False))
        self._parts = self.weight.view(2, *of_gate.shape)
        self._logits: Tensor | None = None
        gate.weight.data = self._parts[0]
        gate.forward = self.forward

    def write(self, weight: Tensor) -> None:
        """Have another mask router, ``[E, H]``, behind every step launched so far."""
        self._parts[1].copy_(weight)

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:
        """The gate's logits ``[T, E]``, as the gate returns them; the masks' are kept.

        Args:
            hidden_states: ``[T, H]``, of the weight's type.
        """
        rows = hidden_states.expand(2, *hidden_states.shape)
        logits, self._logits = torch.bmm(rows, self._parts.mT).unbind()
        return (logits, None) if self._returns_pair else logits

    def take_logits(self, layer: int, router_logits: Tensor) -> Tensor:
        """What the mask router made of the rows for which the gate was called last.

        Args:
            layer: decoder layer index.
            router_logits: what the layer took from the gate.

        Returns:
            ``[T, E]``.

        Raises:
            UnsupportedError: these are not the gate's, so masks would be those of other rows.
        """
        logits, self._logits = self._logits, None
        if logits is None or logits.shape != router_logits.shape:
            raise UnsupportedError(
                f"sere.masks: layer {layer} was given logits {tuple(router_logits.shape)} that its "
                "gate did not make of the same rows, so masks cannot be told; leave masks out"
            )
        return logits


def check_stackable(runner: Any) -> None:
    """Refuse masks beside a gate that is more than a product of the experts' own input.

    Args:
        runner: vLLM's ``MoERunner``.

    Raises:
        UnsupportedError: names the layer and what its gate has.
    """
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    gate, dtype = runner.gate, runner.moe_config.in_dtype
    forward = getattr(type(gate), "forward", None)
    weight = getattr(gate, "weight", None)
    is_quantised = not isinstance(getattr(gate, "quant_method", None), UnquantizedLinearMethod)
    refused = [
        (gate is None, "has a gate that is called outside the layer"),
        (getattr(runner, "_fse_fuse_gate", False), "computes its gate with another one"),
        (
            forward not in (GateLinear.forward, ReplicatedLinear.forward),
            f"has a gate of its own, {type(gate).__name__}",
        ),
        (is_quantised or weight is None, "has a quantised gate"),
        (getattr(gate, "bias", None) is not None, "has a gate with a bias of its product"),
        (
            getattr(weight, "dtype", None) != dtype,
            f"has a gate of {getattr(weight, 'dtype', None)} and rows of {dtype}",
        ),
        (
            getattr(gate, "out_dtype", None) not in (None, dtype),
            f"has a gate with logits of {getattr(gate, 'out_dtype', None)} for rows of {dtype}",
        ),
        (
            getattr(gate, "allow_fp32_router_gemm", False)
            or getattr(gate, "allow_bf16x3_router_gemm", False),
            "has a gate with a kernel for its very shape",
        ),
    ]
    for is_refused, what in refused:
        if is_refused:
            raise UnsupportedError(
                f"sere.masks: layer {runner.layer_name!r} {what}, so the mask router's product "
                "cannot share the gate's launch; leave masks out"
            )
