"""The key ``tau`` of a policy: a number, or one for each layer."""

from typing import Annotated, Any

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError


def _as_tau(value: object) -> float | tuple[float, ...] | None:
    """A number from 0 to 1, or one for each layer."""
    several = isinstance(value, list | tuple)
    numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    plain = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    if value is None:
        return None
    if not numbers or not plain or not all(0 <= n <= 1 for n in numbers):
        raise PydanticCustomError("tau", "must be a number from 0 to 1, or a list of them")
    return tuple(map(float, numbers)) if several else float(numbers[0])


Tau = Annotated[
    float | tuple[float, ...] | None,
    PlainValidator(_as_tau, json_schema_input_type=float | list[float] | None),
]
