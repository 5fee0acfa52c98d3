"""What every path to the engines must answer: used behind Ray's proxy (tests/live) and behind
HAProxy with direct streaming (test_direct_streaming.py)."""

import json
import select
import signal
import socket
import time
from contextlib import ExitStack, closing
from urllib.parse import urlsplit

from sere_ray.bench.differential import ask_all, compare, unintended
from sere_ray.bench.differential_examples import CHAT, QUESTION, TEXT
from tests.live.traffic import counted
from tests.serve.deployment import (
    ADMIN,
    API_KEY,
    HALF_SENT_SECONDS,
    KEY_LIMIT,
    MODEL_ID,
    NO_TIER_KEY,
    wait_for,
)

EXACT = {"vllm_xargs": {"sere_tier": "exact"}}
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
            stack.enter_context(closing(served.begin("1 + 1", max_tokens=100, ignore_eos=True)))
            for _ in range(KEY_LIMIT * processes + 1)
        ]
        answers = as_they_come(connections)
        refused = next(answer for answer in answers if answer.status == 429)
        assert served.complete(key=NO_TIER_KEY, max_tokens=1)[0] == 200, "of another key"
        assert next(answers).status in (200, 429)
        assert refused.headers["retry-after"] == "1"
        assert json.load(refused)["error"]["code"] == "rate_limit_exceeded"
    # A server sees a hang-up a moment later, a busy machine's even later.
    wait_for(lambda: served.complete(max_tokens=1)[0] == 200, 10, "places of those that are gone")


def as_they_come(connections):
    """Answers in the order in which they begin; who has enough of them leaves the others alone."""
    of_socket = {connection.sock: connection for connection in connections}
    while of_socket:
        ready, _, _ = select.select(list(of_socket), [], [], 60)
        for each in ready:
            yield of_socket.pop(each).getresponse()


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


# --- limits --------------------------------------------------------------------------------------


def check_half_sent(served):
    """Requests that are never whole end with 408, whoever they are for, and lock nobody out."""

    def answer(connection, data):
        connection.sendall(data)
        content = b""
        while part := connection.recv(65536):
            content += part
        return content

    def half(method, path, key):
        return (
            f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\n"
            "content-type: application/json\r\ncontent-length: {}\r\n\r\n{{"
        )

    address = urlsplit(served.url)
    with ExitStack() as stack:

        def connection():
            found = socket.create_connection((address.hostname, address.port), 30)
            return stack.enter_context(closing(found))

        for _ in range(500):
            connection().sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n")
        assert served.complete(max_tokens=1)[0] == 200
        begun = time.monotonic()
        assert b" 408 " in answer(connection(), b"GET /v1/models HTTP/1.1\r\n").splitlines()[0]
        for text in (half("POST", TEXT, API_KEY), half("PUT", "/sere/policy", ADMIN)):
            for size in (100, 60_000):  # a large one is timed behind HAProxy
                content = answer(connection(), text.format(size).encode() + b" " * (size // 2))
                head, _, body = content.partition(b"\r\n\r\n")
                assert b" 408 " in head.splitlines()[0], content
                assert json.loads(body)["error"]["code"] == "request_timeout"
        assert time.monotonic() - begun < 5 * 4 * HALF_SENT_SECONDS


def check_answer_limit(served):
    """At the limit a request ends with 408, a stream with an error event; the engine goes no
    further, also where the client has tried to switch that off."""
    engines = served.processes("VLLM::EngineCore")
    body = {"max_tokens": 240, "ignore_eos": True}
    with ExitStack() as stack:
        whole = stack.enter_context(closing(served.begin("1 + 1", **body)))
        stream = stack.enter_context(closing(served.begin("1 + 1", stream=True, **body)))
        events = stream.getresponse()
        assert events.status == 200
        for engine in engines:
            engine.suspend()
            stack.callback(engine.resume)
        answer = whole.getresponse()
        error = json.load(answer)["error"]
        assert (answer.status, error["code"]) == (408, "answer_timeout")
        assert answer.headers["x-should-retry"] == "false"
        last = events.read().split(b"\n\n")[-2].removeprefix(b"data: ")
        assert json.loads(last)["error"]["code"] == "answer_timeout"
    wait_for(lambda: served.complete(max_tokens=1)[0] == 200, 30, "the engines go on")
    counts, _ = counted(served, lambda: time.sleep(1))
    assert counts["decode_rows"] == 0


def check_switches_of_rays(served):
    """A client can neither choose a limit of its own nor keep its hang-up from its engine."""
    headers = {"x-request-timeout-seconds": "0.001"}
    assert served.complete(headers=headers)[0] == 200
    body = {"max_tokens": 240, "ignore_eos": True, "n": 16}
    headers = {"x-request-disconnect-disabled": "?1"}

    def hang_up():
        with closing(served.begin("1 + 1", headers=headers, **body)):
            time.sleep(0.3)

    counts, _ = counted(served, lambda: (hang_up(), time.sleep(2)))
    assert counts["decode_rows"] < 0.9 * 16 * 240
    assert counted(served, lambda: time.sleep(1))[0]["decode_rows"] == 0


LIMITS = (check_half_sent, check_answer_limit, check_switches_of_rays)
"""Each takes a deployment, whatever the path."""
