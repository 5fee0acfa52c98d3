"""Settings by the size of a step: the key ``by_rows`` of a policy.

    rule: margin
    tau: 0.02                      # steps of more than 32 re-routable rows
    by_rows:
    - {up_to: 8, tau: 0.005}       # 1 to 8 rows
    - {up_to: 32, tau: 0.01}       # 9 to 32

An entry replaces keys of the rule; what it does not name is as in the policy.
"""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

MOST_RANGES = 16
_EXAMPLE = "{up_to: 8, tau: 0.01}"
MOST = 1 << 20
"""The largest whole number of a policy: beyond any model and batch; what processes hand on has 64
bits."""


class RowRange(NamedTuple):
    """One entry of ``by_rows``: the rule's keys for steps of at most ``up_to`` re-routable rows.

    It holds from one row more than the entry before. Rows are those that the kept experts are
    chosen over: with several ranks and a global union, those of all ranks.
    """

    up_to: int
    keys: tuple[tuple[str, Any], ...]


def refuse(path: str, value: object, message: str) -> PydanticCustomError:
    """An error that names its own place below the policy."""
    text = f"by_rows{path} = {value!r}: {message}"
    return PydanticCustomError("rule_key", "{text}", {"text": text})


def _as_ranges(value: object) -> tuple[RowRange, ...] | None:
    """Check and convert a list of mappings. Which keys the rule has, the policy checks."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MOST_RANGES:
        raise refuse("", value, f"must be a list of 1 to {MOST_RANGES} entries ({_EXAMPLE})")
    ranges: list[RowRange] = []
    for number, entry in enumerate(value):
        ranges.append(_as_range(entry, f".{number}", ranges[-1].up_to if ranges else 0))
    return tuple(ranges)


def _as_range(entry: object, path: str, before: int) -> RowRange:
    if not isinstance(entry, Mapping) or not all(isinstance(key, str) for key in entry):
        raise refuse(path, entry, f"must be a mapping such as {_EXAMPLE}")
    up_to = entry.get("up_to")
    if not isinstance(up_to, int) or isinstance(up_to, bool) or not before < up_to <= MOST:
        raise refuse(
            f"{path}.up_to",
            up_to,
            f"must be a number of rows above {before} and at most {MOST:,}; entries go from small "
            "steps to large ones",
        )
    keys = {key: entry[key] for key in entry if key != "up_to"}
    if not keys:
        raise refuse(path, dict(entry), "changes nothing; give a key of the rule, or leave it out")
    return RowRange(
        up_to,
        tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in keys.items()),
    )


def _as_mapping(entry: RowRange) -> dict[str, Any]:
    return {"up_to": entry.up_to, **dict(entry.keys)}


RowRanges = Annotated[
    tuple[RowRange, ...] | None,
    PlainValidator(_as_ranges, json_schema_input_type=list[dict[str, Any]] | None),
    PlainSerializer(
        lambda ranges: ranges and [_as_mapping(entry) for entry in ranges],
        return_type=list[dict[str, Any]] | None,
    ),
]
