"""The text of a request, as far as it can be read before an engine has it, and what it is like.

What kind of text a prompt is tells which experts it will want: a vector of its letters in threes
is compared with those of prompts whose experts are known.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sere_ray.engine.signatures import Floats, unit

DIMENSIONS = 256
"""Of a text's vector."""
MOST_CHARACTERS = 2048
"""Read of a text: half of it from its start, half from its end."""
MOST_BODY_BYTES = 256 << 10
"""A larger body is not parsed for its text."""
_PARTS = 64
"""Messages of a conversation that are read, the last ones."""
_CLASSES = np.arange(256, dtype=np.int64)
_CLASSES[ord("A") : ord("Z") + 1] += 32  # letters in one case
_CLASSES[ord("1") : ord("9") + 1] = ord("0")  # a number is a number


def text_vector(text: str) -> Floats:
    """``[DIMENSIONS]`` float32 of length 1: how often letters follow each other, in threes.

    Digits count as one digit. Square roots of counts, so that no repetition outweighs the rest.
    """
    raw = np.frombuffer(_shortened(text).encode("utf-8", "replace"), dtype=np.uint8)
    if len(raw) < 3:
        return np.zeros(DIMENSIONS, dtype=np.float32)
    letters = _CLASSES[raw]
    threes = letters[:-2] * 31 + letters[1:-1] * 1009 + letters[2:] * 65599
    counts = np.bincount((threes >> 3 ^ threes) % DIMENSIONS, minlength=DIMENSIONS)
    return unit(np.sqrt(counts).astype(np.float32))


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return text[:half] + text[-half:]


def text_of_call(arguments: Sequence[Any]) -> str | None:
    """The text of a request as a request router is given it; None where there is none.

    Args:
        arguments: positional ones of the call: those of ``serve_http`` behind Ray's proxy (the ASGI
            scope, the body), or what Ray's ingress request router makes of a body.
    """
    for argument in arguments:
        if isinstance(argument, bytes):
            return text_of_body(argument)
        found = {name: getattr(argument, name, None) for name in ("messages", "prompt")}
        if any(found.values()):
            return text_of_fields(found)
    return None


def text_of_body(body: bytes) -> str | None:
    """The text of a request's body; None if it has none, is too large, or no JSON object."""
    if not body or len(body) > MOST_BODY_BYTES:
        return None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return text_of_fields(fields) if isinstance(fields, dict) else None


def text_of_fields(fields: Mapping[str, Any]) -> str | None:
    """Text of ``messages`` or ``prompt`` of OpenAI's requests; tokens are no text."""
    messages, prompt = fields.get("messages"), fields.get("prompt")
    parts = messages if isinstance(messages, list) else prompt
    if isinstance(parts, str):
        return parts or None
    if not isinstance(parts, list):
        return None
    return "\n".join(filter(None, map(_text_of_part, parts[-_PARTS:]))) or None


def _text_of_part(part: object) -> str:
    """Of a prompt among several, a message, or a piece of its content."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return ""
    content = part.get("content", part.get("text"))
    if isinstance(content, list):
        return "\n".join(filter(None, map(_text_of_part, content[-_PARTS:])))
    return content if isinstance(content, str) else ""
