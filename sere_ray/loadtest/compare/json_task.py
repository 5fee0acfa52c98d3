"""The task ``json``: an object that must satisfy a schema. Right if it does; generated, seeded."""

import json
import random
import re
from typing import Any

from jsonschema import Draft202012Validator

from sere_ray.loadtest.compare.ask import Endpoint
from sere_ray.loadtest.compare.scores import Scores

_NAMES = """
name city title colour owner status level count total year price weight score index size active open
paid ready tags values items points address contact order
"""
_KEYS = _NAMES.split()
_WORDS = ["red", "green", "blue", "small", "medium", "large", "north", "south", "new", "used"]
_PROMPT = (
    "Write one JSON object that satisfies this JSON schema. Reply with the JSON alone, without "
    "explanation.\n{schema}"
)
_FENCE = re.compile(r"\A```\w*\n(.*?)\n?```\Z", re.DOTALL)
_THOUGHT = "</think>"


def run_json(endpoint: Endpoint, items: int, seed: int) -> list[Scores]:
    """Asks for objects; scored once by parsing, once by the schema.

    Raises:
        SereError: the endpoint refuses.
    """
    rng = random.Random(seed)
    schemas = [made_schema(rng) for _ in range(items)]
    replies = endpoint.chats([_PROMPT.format(schema=json.dumps(schema)) for schema in schemas])
    found = [judged(reply.text, schema) for reply, schema in zip(replies, schemas, strict=True)]
    tokens = {"tokens": {str(i): float(reply.tokens) for i, reply in enumerate(replies)}}
    return [
        Scores("json", name, {str(i): marks[place] for i, marks in enumerate(found)}, tokens)
        for place, name in enumerate(("schema", "parses"))
    ]


def judged(text: str, schema: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a reply satisfies a schema, and whether it is JSON at all.

    A fence around it and thoughts before it (``</think>``) have no part.
    """
    text = text.rpartition(_THOUGHT)[2].strip()
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False, False
    return Draft202012Validator(schema).is_valid(value), True


def made_schema(rng: random.Random, depth: int = 1) -> dict[str, Any]:
    """An object of three to six required keys, one of them an object itself."""
    keys = rng.sample(_KEYS, rng.randint(3, 6))
    properties = {key: _value(rng) for key in keys}
    if depth:
        properties[keys[-1]] = made_schema(rng, depth - 1)
    return {
        "type": "object",
        "properties": properties,
        "required": keys,
        "additionalProperties": False,
    }


def _value(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(0, 50)
    choices: list[dict[str, Any]] = [
        {"type": "string", "enum": rng.sample(_WORDS, 3)},
        {"type": "string", "minLength": rng.randint(2, 6), "maxLength": rng.randint(8, 20)},
        {"type": "string", "pattern": f"^[A-Z]{{{rng.randint(1, 3)}}}-[0-9]{{3}}$"},
        {"type": "integer", "minimum": low, "maximum": low + rng.randint(1, 50)},
        {"type": "number", "exclusiveMinimum": low},
        {"type": "boolean"},
        {
            "type": "array",
            "items": {"type": "integer", "minimum": low},
            "minItems": 2,
            "maxItems": rng.randint(2, 5),
            "uniqueItems": True,
        },
    ]
    return rng.choice(choices)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
