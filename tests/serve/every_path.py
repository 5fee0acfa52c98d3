"""What every path to the engines must answer: used behind Ray's proxy (tests/live) and behind
HAProxy with direct streaming (test_direct_streaming.py)."""

import json
import select
import signal
import time
from contextlib import ExitStack, closing

from sere_ray.bench.differential import ask_all, compare, unintended
from tests.live.traffic import counted
from tests.serve.deployment import ADMIN, API_KEY, KEY_LIMIT, MODEL_ID, NO_TIER_KEY, wait_for

EXACT = {"vllm_xargs": {"sere_tier": "exact"}}
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "1 + 1"}]}
BAD_REQUESTS = [
    # who may ask what
    ("GET", "/v1/models", None, None, 401, "Authorization: Bearer"),
    ("GET", "/v1/models", None, "sk-wrong", 401, "wrong key"),
    ("GET", "/v1/models", None, ADMIN, 401, "wrong key"),
    ("POST", TEXT, {"prompt": "a"}, None, 401, "wrong key"),
    ("POST", CHAT, QUESTION, "sk-wrong", 401, "wrong key"),
    ("GET", "/sere/policy", None, None, 401, "wrong key"),
    ("GET", "/sere/policy", None, API_KEY, 403, "does not open /sere"),
    ("PUT", "/sere/policy", {"mode": "off"}, API_KEY, 403, "does not open /sere"),
    ("GET", "/sere/ui/../policy", None, None, 401, "wrong key"),
    ("PUT", "/sere/ui", {}, None, 401, "wrong key"),
    # paths and methods
    ("GET", "/v1/models/other", None, API_KEY, 404, "other"),
    ("GET", "/metrics", None, API_KEY, 404, "No such path"),
    ("GET", "/openapi.json", None, API_KEY, 404, "No such path"),
    ("POST", "/tokenize", {"prompt": "a"}, API_KEY, 404, "No such path"),
    ("POST", "/collective_rpc", {"method": "sere_settle"}, ADMIN, 404, "No such path"),
    ("POST", "/v1/responses", {"input": "a"}, API_KEY, 404, "Not Found"),
    ("POST", "/v1/messages", {**QUESTION, "max_tokens": 4}, API_KEY, 404, "Not Found"),
    ("POST", "/v1/completions/render", {"prompt": "a"}, API_KEY, 404, "Not Found"),
    ("DELETE", "/v1/models", None, API_KEY, 405, "Not Allowed"),
    ("DELETE", "/v1/models", None, None, 401, "wrong key"),
    ("OPTIONS", "/sere/policy", None, None, 401, "wrong key"),
    ("OPTIONS", "/sere/policy", None, ADMIN, 405, "Not Allowed"),
    ("PUT", "/sere/audit", b"{", ADMIN, 405, "Not Allowed"),
    # bodies
    ("PUT", "/sere/policy", b"{", ADMIN, 400, "not JSON"),
    ("PUT", "/sere/policy", b"[]", ADMIN, 422, "dictionary"),
    ("PUT", "/sere/policy", {"select_top_k": 99}, ADMIN, 422, "1..4 is allowed"),
    ("PUT", "/sere/policy", {"treshold": 0.5}, ADMIN, 422, "did you mean 'threshold'"),
    ("PUT", "/sere/artifact", {"name": 5}, ADMIN, 422, "name"),
    ("PUT", "/sere/artifact", {"name": "missing.safetensors"}, ADMIN, 422, "No such file"),
    ("PUT", "/sere/artifact", {"name": "foreign.safetensors"}, ADMIN, 422, "router fingerprint"),
    ("PUT", "/sere/artifact", b" " * 100_001, ADMIN, 413, "100000 bytes"),
    ("POST", TEXT, b"{", API_KEY, 400, "not JSON"),
    ("POST", TEXT, b"[]", API_KEY, 400, "JSON object"),
    ("POST", TEXT, b" " * 100_001, API_KEY, 413, "100000 bytes"),
    ("POST", TEXT, {"model": "other", "prompt": "a"}, API_KEY, 404, "other"),
    ("POST", CHAT, {"model": "other", **QUESTION}, API_KEY, 404, "other"),
    ("POST", TEXT, {"prompt": 5}, API_KEY, 400, "prompt"),
    ("POST", TEXT, {"prompt": "a", "max_tokens": -1}, API_KEY, 400, "max_tokens"),
    ("POST", TEXT, {"prompt": "a", "max_tokens": -1, "stream": True}, API_KEY, 400, "max_tokens"),
    ("POST", TEXT, {"prompt": "a " * 999}, API_KEY, 400, "256"),
    ("POST", CHAT, {"messages": "text"}, API_KEY, 400, "messages"),
    # tiers
    ("POST", TEXT, {"prompt": "a", "vllm_xargs": 1}, API_KEY, 422, "vllm_xargs"),
    (
        "POST",
        TEXT,
        {"prompt": "a", "vllm_xargs": {"sere_tier": "best"}},
        API_KEY,
        422,
        "'best'; allowed: default, exact",
    ),
    ("POST", TEXT, {"prompt": "a", **EXACT}, NO_TIER_KEY, 403, "'exact'"),
    ("POST", CHAT, {**QUESTION, **EXACT}, NO_TIER_KEY, 403, "'exact'"),
]
"""``(method, path, body, key, status, words of the message)``."""


def check_refused(served, method, path, body, key, status, words):
    """The answer's status and message, in OpenAI's form; policy and artifact are as they were."""
    if path.startswith("/v1/") and isinstance(body, dict):
        body = {"model": MODEL_ID, **body}
    before = served.sere("policy"), served.sere("artifact")
    found, answer, headers = served.request(method, path, body, key)
    assert found == status, answer
    assert words in answer["error"]["message"]
    assert "Traceback" not in answer["error"]["message"]
    assert {"message", "type", "code"} <= set(answer["error"])
    assert (found != 401) or "www-authenticate" in {name.lower() for name in headers}
    assert (served.sere("policy"), served.sere("artifact")) == before


def check_as_vllm(served, of_vllm, server):
    """Status, form and fields of every answer are plain vLLM's, but for what is listed as intended;
    no error tells of the server's inside, or gives the input back."""
    cases, expected = of_vllm
    answers = ask_all(served.url, API_KEY, cases)
    rows = list(compare(cases, server, answers, expected))
    assert len(rows) >= 300
    wrong = {row["case"] for row in unintended(rows)}
    assert not [
        (case.name, answer, other)
        for case, answer, other in zip(cases, answers, expected, strict=True)
        if case.name in wrong
    ]
    for answer, other in zip(answers, expected, strict=True):
        assert answer.status < 500 or other.status >= 500
        error = (answer.document or {}).get("error") if answer.status >= 400 else None
        if error:
            assert isinstance(error["param"], str | None)
            assert len(error["param"] or "") < 200
            assert error["message"]


def check_keys_do_not_share_a_cache(served):
    """A key finds its own prompts in the prefix cache, and no other's."""
    prompt = "def add(first, second):\n    return first + second\n\n\n" * 10  # more than a block

    def cached(key):
        status, answer, _ = served.complete(prompt, key=key, max_tokens=1)
        assert status == 200, answer
        return (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0

    assert max(cached(API_KEY) for _ in range(6)) > 0  # on each rank at least twice
    assert cached(NO_TIER_KEY) == 0


def check_too_many_at_once(served, processes):
    """Requests of one key beyond its limit are refused at once; others, and later ones, are not.

    ``processes`` answer requests, and each counts for itself.
    """
    with ExitStack() as stack:
        connections = [
            stack.enter_context(closing(served.begin("1 + 1", max_tokens=200, ignore_eos=True)))
            for _ in range(KEY_LIMIT * processes + 1)
        ]
        answers = as_they_come(connections)
        refused = next(answer for answer in answers if answer.status == 429)
        assert served.complete(key=NO_TIER_KEY, max_tokens=1)[0] == 200, "of another key"
        assert next(answers).status in (200, 429)
        assert refused.headers["retry-after"] == "1"
        assert json.load(refused)["error"]["code"] == "rate_limit_exceeded"
    assert served.complete(max_tokens=1)[0] == 200


def as_they_come(connections):
    """Answers in the order in which they begin; who has enough of them leaves the others alone."""
    of_socket = {connection.sock: connection for connection in connections}
    while of_socket:
        ready, _, _ = select.select(list(of_socket), [], [], 60)
        for socket in ready:
            yield of_socket.pop(socket).getresponse()


def check_hang_up(served, *, stream):
    """The rows of clients that hang up are computed no longer. Leaves the mode ``on``."""
    clients, tokens = 8, 240
    served.sere("policy", {"mode": "on"})

    def rows():
        return served.sere("stats")["total"]["decode_only"]["decode_rows"]

    def hang_up():
        before = rows()
        body = {"max_tokens": tokens, "ignore_eos": True, "stream": stream}
        connections = [served.begin("1 + 1", **body) for _ in range(clients)]
        # Not after a fixed time: on a busy machine no request may have reached an engine by then.
        wait_for(lambda: rows() > before, 30, "a first row")
        for connection in connections:
            connection.close()
        wait_for(lambda: counted(served, lambda: time.sleep(0.5))[0]["decode_rows"] == 0, 20, "end")

    counts, _ = counted(served, hang_up)
    assert 0 < counts["decode_rows"] < 0.75 * clients * tokens, counts


def check_drains(served):
    """At SIGTERM a stream under way is sent to its end; the deployment is gone after it."""
    body = {"max_tokens": 150, "ignore_eos": True, "stream": True}
    response = served.begin("1 + 1", **body).getresponse()
    events = [response.readline()]
    served.process.send_signal(signal.SIGTERM)
    events += response.read().splitlines()
    *_, last, done = [event for event in events if event.startswith(b"data: ")]
    assert done == b"data: [DONE]"
    assert json.loads(last[6:])["choices"][0]["finish_reason"] == "length"
    assert served.process.wait(timeout=90) == 0
    assert "Traceback" not in served.log.read_text()
