"""What an artifact may say of a layer beside its similarity: statistics by name, in groups."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sere_ray.util.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

GROUPS: dict[str, tuple[str, ...]] = {
    "stand_ins": ("output_norm", "stand_in_scale", "stand_in_loss"),
    "directed": ("directed_scale", "directed_loss"),
    "novices": ("novice_score", "output_mean"),
}
"""What `sere-ray calibrate --statistics` takes -> the tensors of a layer that it adds.

- ``output_norm [E]``: mean norm of an expert's output.
- ``stand_in_scale [E, E]``, ``stand_in_loss [E, E]``: row u, how well v stands in for u.
- ``directed_scale [E, E]``, ``directed_loss [E, E]``: the same of every v, not only of those that
  were chosen beside u: what ``spare`` reads.
- ``novice_score [E]``: how much is lost where an expert becomes its mean output.
- ``output_mean [E, H]``: that mean.

All are float32, over the tokens that chose the experts; :mod:`sere_ray.calibration.routed` has the
formulas.
"""
ALL_NAMES = tuple(name for names in GROUPS.values() for name in names)
_COLUMNS = dict.fromkeys(ALL_NAMES, "")
_COLUMNS |= {
    "stand_in_scale": "E",
    "stand_in_loss": "E",
    "directed_scale": "E",
    "directed_loss": "E",
    "output_mean": "H",
}


def is_float32(tensor: "Tensor") -> bool:
    """Whether a tensor of torch's, or an array of numpy's, holds float32."""
    return str(tensor.dtype).removeprefix("torch.") == "float32"


def is_finite(tensor: "Tensor") -> bool:
    """Whether all numbers of a tensor of torch's, or of an array of numpy's, are finite."""
    return bool((abs(tensor) < math.inf).all())  # NaN is not


def check_statistics(named: "Mapping[str, Tensor]", num_experts: int, where: str) -> None:
    """Refuse tensors of another type or shape, or that are not finite.

    Args:
        named: of one layer.
        num_experts: E.
        where: names file and layer in the message.

    Raises:
        ArtifactError: names the tensor.
    """
    for name, tensor in named.items():
        shape = tuple(tensor.shape)
        columns = {"E": (num_experts,), "H": shape[1:2], "": ()}[_COLUMNS[name]]
        dimensions = 1 if _COLUMNS[name] == "" else 2
        expected = (num_experts, *columns)
        if not is_float32(tensor) or shape != expected or len(shape) != dimensions:
            raise ArtifactError(
                f"{where}: {name} is {tensor.dtype} {shape}, must be torch.float32 with "
                f"num_experts = {num_experts}; calibrate again"
            )
        if not is_finite(tensor):
            raise ArtifactError(f"{where}: {name} holds NaN or infinite values; calibrate again")
