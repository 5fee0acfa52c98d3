"""Requests of the comparison with vLLM's server: examples, schemathesis on vLLM's own document,
and hypothesis for headers and bodies. The same ones every time, so that rows can be compared."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from sere_ray.bench.differential_examples import (
    CHAT,
    JSON_TYPE,
    MODEL,
    TEXT,
    Case,
    chat,
    completion,
    examples,
)
from sere_ray.util.errors import SereError

MOST = 4
"""Tokens and answers of a generated request: it shall be cheap."""
HEADERS = (
    "accept",
    "accept-encoding",
    "forwarded",
    "if-match",
    "range",
    "te",
    "traceparent",
    "user-agent",
    "via",
    "x-forwarded-for",
    "x-request-id",
    "x-sere",
    "x-session-id",
)


def all_cases(document: Mapping[str, Any], generated: int) -> list[Case]:
    """Examples, and ``generated`` requests each of schemathesis, of bodies and of headers.

    Args:
        document: vLLM's ``/openapi.json``.
        generated: how many of each kind.

    Raises:
        SereError: schemathesis is not installed.
    """
    cases = [*examples(), *_of_document(document, generated), *_of_bodies(document, generated)]
    cases += _of_headers(generated)
    unique = {(c.method, c.path, c.headers, c.body, c.with_key): c for c in reversed(cases)}
    return list(reversed(unique.values()))


def _draw(strategy: Any, count: int) -> list[Any]:
    """The same values each time."""
    from hypothesis import HealthCheck, Phase, given, settings

    values: list[Any] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        values.append(value)

    collect()
    return values[:count]


def _of_document(document: Mapping[str, Any], count: int) -> Iterator[Case]:
    try:
        import schemathesis
        from schemathesis import GenerationMode
    except ImportError:
        raise SereError("schemathesis is not installed: pip install '.[dev]'") from None
    schema = schemathesis.openapi.from_dict(dict(document))
    for path in (TEXT, CHAT):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            strategy = schema[path]["POST"].as_strategy(generation_mode=mode)
            for number, drawn in enumerate(_draw(strategy, count // 4)):
                name = f"schemathesis {mode.value} {path} {number}"
                yield Case(name, path=path, body=_cheap(drawn.body))


def _cheap(body: Any) -> bytes:
    """Of the served model, and short: most values are too wild to reach anything else."""
    if isinstance(body, dict):
        body = {**body, "model": MODEL}
        for key in ("max_tokens", "max_completion_tokens", "n", "min_tokens"):
            if isinstance(body.get(key), int) and body[key] > MOST:
                body[key] = MOST
        body.setdefault("max_tokens", MOST)
    return json.dumps(body, default=str).encode()


def _of_bodies(document: Mapping[str, Any], count: int) -> Iterator[Case]:
    """Good requests with one field each at an odd value: every field has its turn."""
    from hypothesis import strategies as st

    numbers = st.sampled_from([0, -1, 1, 2, 10**20, -(10**20), 0.5, -0.0, 1e308, float("nan")])
    texts = st.sampled_from(["", "a", "\0", "\ud800", "\U0001f600", "null", "1", "true", "a" * 999])
    leaf = st.none() | st.booleans() | numbers | texts
    odd = st.recursive(
        leaf,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["type", "a", "", "json", "1"]), inner, max_size=3)
        ),
        max_leaves=5,
    )
    kinds: tuple[tuple[str, str, Callable[..., Case]], ...] = (
        (TEXT, "CompletionRequest", completion),
        (CHAT, "ChatCompletionRequest", chat),
    )
    for path, model, make in kinds:
        fields = sorted(set(document["components"]["schemas"][model]["properties"]) - {"model"})
        for number, value in enumerate(_draw(odd, count)):
            field = fields[number % len(fields)]
            name = f"hypothesis body {path} {number}: {field}"
            yield replace(make("", **{field: value}), name=name)


def _of_headers(count: int) -> Iterator[Case]:
    """A good request under headers that HTTP allows, with any byte that may be in a value."""
    from hypothesis import strategies as st

    values = st.binary(max_size=20).map(
        lambda raw: bytes(b for b in raw if b >= 0x20 and b != 0x7F).strip()
    )
    headers = st.dictionaries(st.sampled_from(HEADERS), values, min_size=1, max_size=4)
    for number, drawn in enumerate(_draw(headers, count // 2)):
        pairs = (*JSON_TYPE, *drawn.items())
        good = completion("")
        yield replace(good, name=f"hypothesis headers {number}", headers=pairs)
