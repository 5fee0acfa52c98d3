"""What a wrong key of a policy is answered with: one sentence that says what to do."""

import difflib
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel


def explain(error: Any, where: str, model: type[BaseModel], at_start: Collection[str] = ()) -> str:
    """The key, the value, what is allowed and what to do.

    Args:
        error: one of a ValidationError.
        where: name of the mapping.
        model: which it was to be.
        at_start: keys that only the start of an engine takes.
    """
    path = ".".join([where, *(str(part) for part in error["loc"])])
    key = str(error["loc"][0]) if error["loc"] else ""
    keys = list(model.model_fields)
    if error["type"] == "rule_key":
        return f"{where}.{error['msg']}"
    if key not in keys and key in at_start:
        return (
            f"{path} = {error['input']!r}: is taken when an engine starts and is no part of a "
            "policy; leave it out here"
        )
    if key not in keys:
        near = difflib.get_close_matches(key, [*keys, *at_start], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return (
            f"{path} = {error['input']!r}: unknown key; {hint}allowed keys: {', '.join(keys)}; "
            f"at the start of an engine also {', '.join(at_start)}"
        )
    about = model.model_fields[key].description
    if error["type"] == "missing":
        return f"{path} is missing: give it ({about})"
    message = error["msg"][0].lower() + error["msg"][1:]
    if key == "mode" and isinstance(error["input"], bool):
        message += ", in quotes: YAML reads a bare on or off as a boolean"
    return f"{path} = {error['input']!r}: {message} ({about})"
