"""What is read of a request's body, and that texts of a kind are like each other."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from sere_ray.serve.by_experts.text import (
    MOST_BODY_BYTES,
    MOST_CHARACTERS,
    text_of_body,
    text_of_call,
    text_vector,
)

CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
PARTS = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"url": "x"}]}]}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": "Hi"}, "Hi"),
        ({"prompt": ["Hi", "there"]}, "Hi\nthere"),
        (CHAT, "Be brief.\nHi"),
        (PARTS, "Hi"),
        ({"prompt": [1, 2, 3]}, None),
        ({"prompt": [[1, 2], [3]]}, None),
        ({"prompt": ""}, None),
        ({"messages": []}, None),
        ({"messages": "Hi"}, None),
        ({"messages": [None, 3, {"content": 4}, {}]}, None),
        ({"model": "m"}, None),
    ],
)
def test_the_text_of_a_request(fields, text):
    body = json.dumps(fields).encode()
    assert text_of_body(body) == text
    assert text_of_call([{"type": "http", "path": "/v1/completions"}, body]) == text
    assert text_of_call([SimpleNamespace(**fields)]) == text


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"prompt": "' + b"a" * MOST_BODY_BYTES],
)
def test_no_body_is_too_strange(body):
    assert text_of_body(body) is None


def test_texts_of_a_kind_are_alike():
    sums = [text_vector(f"Work out {i} * {i % 7} + {3 * i}.") for i in range(100, 110)]
    code = [text_vector(f"def name_{i}(self):\n    return self._{i} + 1\n") for i in range(10)]
    for vector in sums + code:
        assert abs(np.linalg.norm(vector) - 1) < 1e-5
    within = min(np.dot(a, b) for kind in (sums, code) for a in kind for b in kind)
    across = max(np.dot(a, b) for a in sums for b in code)
    assert within > 0.8 > 0.3 > across


def test_a_long_text_is_its_start_and_its_end():
    start, end = "a b c " * MOST_CHARACTERS, " 1, 2, 3" * MOST_CHARACTERS
    middles = [text_vector(start + middle * 1000 + end) for middle in ("xyz", "qrs")]
    assert np.array_equal(*middles)
    assert not text_vector("ab").any()
