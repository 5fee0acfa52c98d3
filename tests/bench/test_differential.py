"""What counts as a difference from vLLM; tests/live/test_differential.py runs the servers."""

import json

import pytest

from sere_ray.bench.differential import Answer, compare, form, leaks, unintended
from sere_ray.bench.differential_cases import MOST, _cheap
from sere_ray.bench.differential_examples import Case, examples


def answer(document, status=200, media_type="application/json"):
    return Answer(status, media_type, json.dumps(document).encode())


def error(status=400, form=dict, **fields):
    whole = {"message": "no", "type": "BadRequestError", "param": None, "code": status, **fields}
    return answer({"error": form(whole)}, status)


def events(*documents, end=b"data: [DONE]\n\n"):
    lines = [b"data: " + json.dumps(document).encode() + b"\n\n" for document in documents]
    return Answer(200, "text/event-stream", b"".join(lines) + end)


WHOLE = {"id": "a", "choices": [{"text": "b", "index": 0}]}


@pytest.mark.parametrize(
    ("ours", "vllm", "is_same"),
    [
        (answer(WHOLE), answer({"id": "c", "choices": [{"text": "d", "index": 1}]}), True),
        (answer(WHOLE), answer({**WHOLE, "usage": {}}), False),
        (answer(WHOLE), answer({**WHOLE, "choices": WHOLE["choices"] * 2}), False),
        (answer(WHOLE), answer(WHOLE, 201), False),
        (answer(WHOLE), answer(WHOLE, media_type="text/plain"), False),
        (error(message="other words"), error(), True),
        (error(param="prompt"), error(), False),
        (error(type="invalid_request_error"), error(), False),
        (error(code="invalid_json"), error(), False),
        (error(), error(more=1), False),
        (error(message={}), error(), False),
        (answer({"detail": "no"}, 400), error(), False),
        (events(WHOLE, WHOLE), events(WHOLE), True),  # how many tokens come at once is chance
        (events(WHOLE, end=b""), events(WHOLE), False),
        (events(WHOLE, {"error": {}}), events(WHOLE), False),
        (Answer(0, "", b"RemoteDisconnected"), error(), False),
    ],
)
def test_differences(ours, vllm, is_same):
    same = ours.status == vllm.status and form(ours) == form(vllm)
    assert same == is_same
    (row,) = compare([Case("a case")], "default", [ours], [vllm])
    assert row["as_vllm"] == is_same
    assert (row["status"], row["vllm_status"]) == (ours.status, vllm.status)
    assert bool(unintended([row])) == (not is_same)


@pytest.mark.parametrize(
    "message",
    [
        'File "/opt/a.py", line 3, in f',
        "Traceback (most recent call last):",
        "/srv/.venv/lib/python3.11/site-packages/ray/serve/api.py",
        "ray::ServeReplica:app (pid=12, ip=192.0.2.2)",
        "actor_id=1", "on 0123456789abcdef0123456789abcdef0123456789abcdef01234567",
    ],
)  # fmt: skip
def test_an_error_that_tells_of_the_servers_inside_is_a_difference(message):
    assert leaks(error(message=message))
    assert not leaks(answer({"id": message}))
    rows = compare([Case("a case")], "default", [error(message=message)], [error()])
    assert unintended(list(rows))


def test_what_is_intended_has_its_reason_in_the_row():
    ours = error(403, code="foreign_origin", type="invalid_request_error")
    (row,) = compare([Case("a case")], "direct", [ours], [answer(WHOLE)])
    assert (row["as_vllm"], row["intended"]) == (False, "403 `foreign_origin`")
    assert not unintended([row])


def test_an_intended_difference_excuses_no_other_status():
    detail = answer({"detail": "Not Found"}, 404)
    rows = compare([Case("a case")], "direct", [error(500)], [detail])
    assert unintended(list(rows))


def test_examples_have_names_of_their_own():
    names = [case.name for case in examples()]
    assert len(names) == len(set(names)) > 180


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens", "n", "min_tokens"])
def test_a_generated_request_is_cheap(key):
    assert json.loads(_cheap({key: 10**6}))[key] == MOST
    assert json.loads(_cheap({key: "many"}))[key] == "many", "what is refused stays as it is"
