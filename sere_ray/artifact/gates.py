"""Where a mixture-of-experts block keeps its gate: one answer for calibration and for engines."""

from torch import Tensor, nn

_NAMES = ("gate", "router")
"""Of the gate beside a block's experts, in transformers and in vLLM."""


def find_gate(block: nn.Module) -> nn.Module | None:
    """The gate beside a block's experts; None where there is none under a known name.

    Args:
        block: the module that holds the experts, of transformers or of vLLM.
    """
    found = (getattr(block, name, None) for name in _NAMES)
    return next((gate for gate in found if isinstance(gate, nn.Module)), None)


def gate_weight(gate: nn.Module) -> Tensor | None:
    """The weight ``[E, H]`` of a gate: its own, or that of its only matrix (Hunyuan's ``gate.wg``,
    Granite's ``router.layer``); None where it has another number of them."""
    weights = [getattr(module, "weight", None) for module in gate.modules()]
    matrices = [w for w in weights if isinstance(w, Tensor) and w.dim() == 2]
    return matrices[0] if len(matrices) == 1 else None
