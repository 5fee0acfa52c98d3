"""The access layer in front of a stand-in application: what reaches it, and what does not."""

import asyncio
import json
import os
from types import SimpleNamespace

import pytest
import yaml

from sere_ray.policy.tiers import forbids_score
from sere_ray.serve.gateway.access import PRINCIPAL, VISITORS, AccessConfig, AccessLayer
from sere_ray.serve.gateway.bodies import answers_asked
from sere_ray.serve.gateway.keys import KeyFile, KeyRing, digest, from_environment, new_key
from sere_ray.util.errors import SereError

KEYS = {
    "keys": [
        {"name": "all", "sha256": digest("k-all")},
        {"name": "plain", "sha256": digest("k-plain"), "tiers": ["default"]},
        {"name": "exact", "sha256": digest("k-exact"), "default_tier": "exact"},
        {"name": "unscored", "sha256": digest("k-unscored"), "score": False},
    ],
    "admin": [{"name": "ops", "sha256": digest("t-ops")}],
}


class Inner:
    """Answers 200 with what it was asked, once it may."""

    def __init__(self):
        self.requests, self.may_answer = [], asyncio.Event()
        self.may_answer.set()

    async def __call__(self, scope, receive, send):
        message = await receive() if scope["method"] == "POST" else {}
        self.requests.append((scope, json.loads(message.get("body") or b"null")))
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def layer(inner, *, keys=KEYS, public=frozenset(), loopback=None, **limits):
    config = AccessConfig.model_validate({"max_body_bytes": 1024, **limits})
    fixed = KeyFile.model_validate(keys or {})
    return AccessLayer(inner, config=config, fixed=fixed, public=public, loopback=loopback)


async def ask(app, method="GET", path="/v1/models", *, key=None, body=b"", headers=(), **scope):
    """``(status, JSON, headers)``."""
    status, content, found = await ask_text(app, method, path, headers, key=key, body=body, **scope)
    return status, json.loads(content or b"null"), found


async def ask_text(app, method, path, headers=(), *, key=None, body=b"", **scope):
    """``(status, body, headers)``."""
    sent = [(b"host", b"127.0.0.1:8000"), *headers]
    if key is not None:
        sent.append((b"authorization", f"Bearer {key}".encode()))
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": "",
        "headers": sent,
        "client": ("127.0.0.1", 4000),
        **scope,
    }
    parts = [body[i : i + 300] for i in range(0, len(body), 300)] or [b""]
    messages = iter(
        [
            {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)}
            for i, part in enumerate(parts)
        ]
    )
    answer = []

    async def receive():
        return next(messages)

    async def send(message):
        answer.append(message)

    await app(scope, receive, send)
    content = b"".join(message.get("body", b"") for message in answer)
    return answer[0]["status"], content, dict(answer[0]["headers"])


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


JSON = (b"content-type", b"application/json")


def completion(inner, key, body=None, headers=(), **limits):
    content = json.dumps(body or {"prompt": "a"}).encode()
    app = layer(inner, **{"share_prefix_cache": True, **limits})
    headers = [JSON, *headers]
    return run(ask(app, "POST", "/v1/completions", key=key, body=content, headers=headers))


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v1/models", "k-all", 200),
        ("/v1/models", "K-ALL", 401),
        ("/v1/models", "", 401),
        ("/v1/models", None, 401),
        ("/v1/models", "t-ops", 401),
        ("/sere/policy", "t-ops", 200),
        ("/sere/policy", "k-all", 403),
        ("/sere/policy", None, 401),
        ("/v1", "k-all", 200),
        ("/v1", None, 401),
        ("/health", None, 200),
        ("/health/", None, 200),
        ("/health/other", "k-all", 404),
        ("/sere", "t-ops", 404),
        ("/metrics", "t-ops", 404),
        ("//sere/policy", "k-all", 404),
        ("/V1/models", "k-all", 404),
    ],
)
def test_which_key_opens_what(path, key, status):
    inner = Inner()
    found, answer, _ = run(ask(layer(inner), path=path, key=key))
    assert found == status
    assert len(inner.requests) == (status == 200)
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}


PAGE = frozenset({"/sere/ui", "/sere/ui/app.js"})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/sere/ui", 200),
        ("HEAD", "/sere/ui/app.js", 200),
        ("PUT", "/sere/ui", 401),
        ("DELETE", "/sere/ui", 405),
        ("GET", "/sere/ui/", 401),
        ("GET", "/sere/ui/app.js/..", 401),
        ("GET", "/sere/ui/../policy", 401),
        ("GET", "/sere/policy", 401),
    ],
)
def test_public_paths_are_open_as_they_stand(method, path, status):
    inner = Inner()
    assert run(ask(layer(inner, public=PAGE), method, path))[0] == status
    assert len(inner.requests) == (status == 200)


def test_without_keys_public_paths_too_are_for_this_machine():
    far = {"client": ("192.0.2.1", 4000)}
    app = layer(Inner(), keys=None, public=PAGE)
    assert run(ask(app, path="/sere/ui", **far))[0] == 403
    assert run(ask(app, path="/sere/ui"))[0] == 200


@pytest.mark.parametrize(
    ("word", "host", "client", "status"),
    [
        ("the-word", "127.0.0.1:8000", "192.0.2.7", 200),  # HAProxy's address, of this machine
        ("the-word", "[::1]:8000", "127.0.0.1", 200),
        ("the-word", "evil.example:8000", "127.0.0.1", 403),
        ("a-guess", "127.0.0.1:8000", "127.0.0.1", 403),
        ("", "127.0.0.1:8000", "127.0.0.1", 403),
        (None, "127.0.0.1:8000", "127.0.0.1", 403),  # past HAProxy
    ],
)
def test_behind_haproxy_only_its_word_tells_of_this_machine(word, host, client, status):
    inner = Inner()
    app = layer(inner, keys=None, loopback=digest("the-word"))
    headers = [] if word is None else [(b"x-sere-loopback", word.encode())]
    scope = {"headers": [(b"host", host.encode()), *headers], "client": (client, 4000)}
    assert run(ask(app, **scope))[0] == status
    assert len(inner.requests) == (status == 200)


def test_visitors_without_a_key_take_a_bounded_number_of_places():
    async def scenario():
        inner = Inner()
        inner.may_answer.clear()
        app = layer(inner, public=PAGE)
        waiting = [asyncio.create_task(ask(app, path="/sere/ui")) for _ in range(VISITORS)]
        await asyncio.sleep(0)
        status, _, headers = await ask(app, path="/sere/ui")
        assert (status, headers[b"retry-after"]) == (429, b"1")
        inner.may_answer.set()
        assert (await ask(app, key="k-all"))[0] == 200
        assert {answer[0] for answer in await asyncio.gather(*waiting)} == {200}
        assert (await ask(app, path="/sere/ui"))[0] == 200

    run(scenario())


def test_a_path_that_names_another_only_when_normalised_is_a_matter_of_its_prefix():
    """/v1/../sere/policy is handed on as it stands, and no route has that name."""
    inner = Inner()
    run(ask(layer(inner), path="/v1/../sere/policy", key="k-all"))
    assert inner.requests[0][0]["path"] == "/v1/../sere/policy"


def test_the_prefix_of_an_application_does_not_count():
    inner = Inner()
    assert run(ask(layer(inner), path="/app/v1/models", root_path="/app", key="k-all"))[0] == 200
    assert run(ask(layer(inner), path="/app/sere/policy", root_path="/app", key="k-all"))[0] == 403


def test_the_holder_is_known_and_the_key_is_not_in_any_answer():
    inner = Inner()
    run(ask(layer(inner), key="k-plain"))
    assert inner.requests[0][0][PRINCIPAL] == "plain"
    _, answer, headers = run(ask(layer(inner), key="sk-secret"))
    assert "secret" not in json.dumps(answer)
    assert headers[b"www-authenticate"] == b"Bearer"


def test_websockets_are_refused():
    sent = []

    async def scenario():
        async def send(message):
            sent.append(message["type"])

        await layer(Inner())({"type": "websocket", "path": "/v1/models"}, None, send)

    run(scenario())
    assert sent == ["websocket.close"]


@pytest.mark.parametrize(
    ("client", "host", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.0.0.1", "localhost:8000", 200),
        ("::1", "[::1]:8000", 200),
        ("10.0.0.7", "127.0.0.1:8000", 403),
        ("127.0.0.1", "evil.example:8000", 403),  # DNS rebinding
        ("127.0.0.1", "", 403),
        (None, "127.0.0.1", 403),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/sere/policy"])
def test_without_any_key_only_this_machine_is_served(client, host, status, path):
    app = layer(Inner(), keys=None)
    peer = None if client is None else (client, 1)
    headers = [(b"host", host.encode())]
    assert run(ask(app, path=path, client=peer, headers=headers))[0] == status


def test_with_api_keys_but_no_admin_nobody_is_one():
    app = layer(Inner(), keys={"keys": KEYS["keys"]})
    assert run(ask(app, path="/sere/policy"))[0] == 401


@pytest.mark.parametrize(
    ("key", "header", "body", "tier"),
    [
        ("k-all", None, None, None),
        ("k-all", "exact", None, "exact"),
        ("k-all", None, "exact", "exact"),
        ("k-all", "default", "exact", None),
        ("k-exact", None, None, "exact"),
        ("k-exact", "default", None, None),
        ("k-exact", None, "default", None),
        ("k-plain", "default", None, None),
    ],
)
def test_tier(key, header, body, tier):
    inner = Inner()
    headers = [] if header is None else [(b"x-sere-tier", header.encode())]
    xargs = {"other": 1} if body is None else {"other": 1, "sere_tier": body}
    status, *_ = completion(inner, key, {"prompt": "a", "vllm_xargs": xargs}, headers)
    assert status == 200
    scope, received = inner.requests[0]
    expected = {"other": 1} if tier is None else {"other": 1, "sere_tier": tier}
    assert received == {"prompt": "a", "vllm_xargs": expected}
    assert dict(scope["headers"])[b"content-length"] == str(len(json.dumps(received))).encode()


@pytest.mark.parametrize(
    ("key", "xargs", "expected"),
    [
        ("k-all", None, None),
        ("k-all", {"sere_score": "never"}, {"sere_score": "never"}),
        ("k-unscored", None, {"sere_score": "never"}),
        ("k-unscored", {"sere_score": "please"}, {"sere_score": "never"}),
        ("k-unscored", {"sere_tier": "exact"}, {"sere_score": "never", "sere_tier": "exact"}),
    ],
)
def test_a_key_or_a_request_may_forbid_scores(key, xargs, expected):
    inner = Inner()
    body = {"prompt": "a"} if xargs is None else {"prompt": "a", "vllm_xargs": xargs}
    status, *_ = completion(inner, key, body)
    assert status == 200
    _, received = inner.requests[0]
    assert received.get("vllm_xargs") == expected
    assert forbids_score(SimpleNamespace(extra_args=expected)) == (expected is not None)


@pytest.mark.parametrize(
    ("key", "header", "body", "status", "code"),
    [
        ("k-plain", "exact", {}, 403, "tier_not_permitted"),
        ("k-plain", None, {"vllm_xargs": {"sere_tier": "exact"}}, 403, "tier_not_permitted"),
        ("k-all", "best", {}, 422, "invalid_tier"),
        ("k-all", None, {"vllm_xargs": {"sere_tier": ["exact"]}}, 422, "invalid_tier"),
        ("k-all", None, {"vllm_xargs": "exact"}, 422, "invalid_parameter"),
    ],
)
def test_tier_refused(key, header, body, status, code):
    inner = Inner()
    headers = [] if header is None else [(b"x-sere-tier", header.encode())]
    found, answer, _ = completion(inner, key, {"prompt": "a", **body}, headers)
    assert (found, answer["error"]["code"], inner.requests) == (status, code, [])


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"a": 1}', [], 200),
        (b"{", [], 400),
        (b"", [], 200),  # vLLM says what is missing
        (b'"text"', [], 400),
        (b"\xff", [], 400),
        (b"[" * 900, [], 400),
        (b'{"a": "' + b"x" * 1024 + b'"}', [], 413),
        (b"{}", [(b"content-length", b"99999999999")], 413),
        (b"{}", [(b"content-length", b"9" * 6000)], 413),
    ],
)
def test_body(body, headers, status):
    inner = Inner()
    found, answer, _ = run(
        ask(
            layer(inner),
            "POST",
            "/v1/completions",
            key="k-all",
            body=body,
            headers=[JSON, *headers],
        )
    )
    assert found == status
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert len(inner.requests) == (status == 200)


def test_concurrency_is_bounded_per_key_and_over_all():
    async def scenario():
        inner = Inner()
        inner.may_answer.clear()
        app = layer(inner, max_concurrent_requests=3, max_concurrent_per_key=2)
        waiting = [asyncio.create_task(ask(app, key="k-all")) for _ in range(2)]
        await asyncio.sleep(0)
        status, answer, headers = await ask(app, key="k-all")
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert headers[b"retry-after"] == b"1"
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        waiting.append(asyncio.create_task(ask(app, key="k-plain")))
        await asyncio.sleep(0)
        assert (await ask(app, key="k-exact"))[0] == 429
        inner.may_answer.set()
        assert [status for status, *_ in await asyncio.gather(*waiting)] == [200] * 3
        assert (await ask(app, key="k-all"))[0] == 200

    run(scenario())


def test_a_failing_application_gives_its_place_back_and_tells_nothing():
    async def scenario():
        async def broken(scope, receive, send):
            raise RuntimeError("broken at /srv/secret.py")

        app = layer(broken, max_concurrent_per_key=1)
        for _ in range(3):
            status, answer, _ = await ask(app, key="k-all")
            assert status == 500
            assert answer["error"]["type"] == "InternalServerError"
            assert "secret" not in str(answer)

    run(scenario())


@pytest.mark.parametrize(
    ("body", "answers"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": "a", "n": 3}, 3),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": ["1", "2"]}, 2),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1], [2, 3]]}, 2),
        ({"prompt": "a", "prompt_embeds": ["x", "y"]}, 3),
        ({"messages": [], "n": "2"}, 2),
        ({"n": 2.0}, 2),
        ({"n": None}, 1),
        ({"n": -5, "prompt": []}, 1),
        ({"n": float("inf")}, 1),
        ({"n": float("nan")}, 1),
        ({"n": "many"}, 1),
        ({"n": [7], "prompt": {"a": 1}}, 1),
        ({"n": 10**30}, 10**30),
    ],
)
def test_answers_that_a_request_asks_for(body, answers):
    assert answers_asked(body) == answers


def test_limits_count_answers_and_not_requests():
    async def scenario():
        inner = Inner()
        inner.may_answer.clear()
        app = layer(inner, max_concurrent_requests=5, max_concurrent_per_key=4)

        def post(key, **fields):
            body = json.dumps({"prompt": "a", **fields}).encode()
            return ask(app, "POST", "/v1/completions", key=key, body=body, headers=[JSON])

        waiting = [asyncio.create_task(post("k-all", prompt=["a", "b"], n=2))]
        await asyncio.sleep(0)
        assert (await post("k-all"))[0] == 429
        assert (await post("k-plain", n=2))[0] == 429, "over all keys"
        waiting.append(asyncio.create_task(post("k-plain")))
        await asyncio.sleep(0)
        status, answer, _ = await post("k-exact", n=5)
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        inner.may_answer.set()
        assert [status for status, *_ in await asyncio.gather(*waiting)] == [200, 200]
        status, answer, _ = await post("k-all", n=5)
        assert (status, answer["error"]["code"]) == (400, "too_many_answers")
        assert "a key may have 4" in answer["error"]["message"]
        assert (await post("k-all", n=4))[0] == 200

    run(scenario())


# --- whose prefix cache --------------------------------------------------------------------------


def salt_of(key, body=None, group=None, **options):
    inner = Inner()
    keys = {"keys": [{**each, "group": group} for each in KEYS["keys"]]} if group else KEYS
    options = {"share_prefix_cache": False, "keys": keys, **options}
    assert completion(inner, key, {"prompt": "a", **(body or {})}, **options)[0] == 200
    return inner.requests[0][1].get("cache_salt")


def test_keys_do_not_find_each_others_prompts():
    salts = {
        salt_of(key, body) for key in ("k-all", "k-plain") for body in ({}, {"cache_salt": "x"})
    }
    assert len(salts) == 4
    assert None not in salts
    assert "x" not in salts
    assert salt_of("k-all") == salt_of("k-all"), "a key finds its own"


def test_keys_of_a_group_do():
    assert salt_of("k-all", group="team") == salt_of("k-plain", group="team")
    assert salt_of("k-all", group="team") != salt_of("k-all", group="all")
    assert salt_of("k-all", group="all") == salt_of("k-all"), "a key is a group of its own name"


def test_one_switch_shares_the_cache():
    assert salt_of("k-all", share_prefix_cache=True) is None
    assert salt_of("k-all", {"cache_salt": "x"}, share_prefix_cache=True) == "x"


@pytest.mark.parametrize("salt", ["", 5, [], {}])
def test_a_salt_that_is_none_is_left_for_vllm_to_refuse(salt):
    assert salt_of("k-all", {"cache_salt": salt}) == salt


def test_without_keys_nothing_is_salted():
    assert salt_of(None, keys=None) is None


# --- browsers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [b"text/plain", b"", b"application/json5", None])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_body_of_another_type_reaches_no_engine(kind, path):
    """The content type stays as it was sent, so that vLLM refuses it."""
    inner = Inner()
    headers = [] if kind is None else [(b"content-type", kind)]
    assert run(ask(layer(inner), "POST", path, key="k-all", body=b"{}", headers=headers))[0] == 200
    scope, received = inner.requests[0]
    assert received is None
    assert dict(scope["headers"]).get(b"content-type") == kind


def test_no_other_route_gets_a_body():
    inner = Inner()
    for path in ("/v1/other", "/v1/completions/", "/v1/models", "/health"):
        run(ask(layer(inner), "POST", path, key="k-all", body=b'{"a": 1}', headers=[JSON]))
    assert [received for _, received in inner.requests] == [None] * 4


ORIGIN = b"https://chat.example.com"


@pytest.mark.parametrize("keys", [KEYS, None])
@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        (b"http://127.0.0.1:8000", 200),  # the page itself
        (b"https://127.0.0.1:8000", 200),  # behind a proxy that ends TLS
        (b"http://127.0.0.1:3000", 403),
        (b"http://localhost:8000", 403),
        (b"null", 403),
        (b"", 403),
        (b"https://elsewhere.example", 403),
        (ORIGIN, 200),
        (b"https://chat.example.com.evil.example", 403),
    ],
)
def test_pages_of_other_origins_are_refused_unless_allowed(keys, origin, status):
    inner = Inner()
    app = layer(inner, keys=keys, allowed_origins=[ORIGIN.decode()])
    headers = [] if origin is None else [(b"origin", origin)]
    found, answer, headers = run(ask(app, key="k-all" if keys else None, headers=headers))
    assert (found, len(inner.requests)) == (status, status == 200)
    assert (headers.get(b"access-control-allow-origin") == ORIGIN) == (origin == ORIGIN)
    if status == 403:
        assert answer["error"]["code"] == "foreign_origin"
        assert "access.allowed_origins" in answer["error"]["message"]


def test_an_allowed_page_may_ask_what_it_may_send_and_read_its_refusals():
    inner = Inner()
    app = layer(inner, allowed_origins=[ORIGIN.decode()])
    preflight = [(b"origin", ORIGIN), (b"access-control-request-method", b"POST")]
    status, _, headers = run(ask_text(app, "OPTIONS", "/v1/completions", preflight))
    assert (status, headers[b"access-control-allow-origin"]) == (200, ORIGIN)
    status, _, headers = run(ask(app, headers=[(b"origin", ORIGIN)]))
    assert (status, headers[b"access-control-allow-origin"]) == (401, ORIGIN)
    assert inner.requests == []


@pytest.mark.parametrize("origin", ["*", "chat.example.com", "https://chat.example.com/", "null"])
def test_an_origin_has_no_path_and_no_star(origin):
    with pytest.raises(ValueError, match="is no origin"):
        AccessConfig(allowed_origins=[origin])


# --- keys ----------------------------------------------------------------------------------------


def test_the_key_file_is_read_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("sere_ray.serve.gateway.keys.RELOAD_SECONDS", 0)
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump(KEYS))
    ring = KeyRing(str(path), KeyFile())
    assert ring.api_key("k-all").name == "all"
    path.write_text(yaml.safe_dump({"keys": KEYS["keys"][1:]}))
    os.utime(path, ns=(1, 1))
    assert ring.api_key("k-all") is None
    path.write_text("keys: [broken")
    os.utime(path, ns=(2, 2))
    assert ring.api_key("k-plain").name == "plain", "a broken file must change nothing"
    path.write_text("")
    os.utime(path, ns=(3, 3))
    assert ring.api_key("k-plain") is None
    assert not ring.is_open, "an empty file locks everybody out; it opens nothing"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"keys": [{"name": "a", "sha256": "sk-plain-text"}]}, ["keys.0.sha256", "pattern"]),
        ({"keys": [{"name": "a b", "sha256": "0" * 64}]}, ["keys.0.name"]),
        ({"key": []}, ["key", "not permitted"]),
        (
            {"keys": [{"name": "a", "sha256": "0" * 64, "tiers": ["exact"]}]},
            ["default_tier 'default' is not among tiers"],
        ),
    ],
)
def test_mistakes_in_the_key_file(tmp_path, has_words, content, words):
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SereError) as caught:
        KeyFile.load(path)
    has_words(str(caught.value), "keys.yaml", *words)
    assert "sk-plain-text" not in str(caught.value)


def test_keys_of_the_environment_are_hashed_at_once(monkeypatch):
    monkeypatch.setenv("SERE_API_KEY", "k-env\n")  # as `$(cat FILE)` does not, but secrets do
    monkeypatch.delenv("SERE_ADMIN_TOKEN", raising=False)
    keys = from_environment()
    assert "k-env" not in repr(keys)
    assert KeyRing(None, keys).api_key("k-env").name == "env"
    assert keys.admin == ()


def test_new_keys_differ():
    assert new_key() != new_key()
    assert len(new_key()) > 40


def test_below_sere_the_route_decides_first_but_no_body_is_too_large():
    """Its JSON is read by the application; see tests/live/test_openapi.py."""
    inner = Inner()
    arguments = {"key": "t-ops", "body": b"{"}
    assert run(ask(layer(inner), "PUT", "/sere/audit", **arguments))[0] == 200, "handed on"
    arguments["body"] = b"x" * 1025
    assert run(ask(layer(inner), "PUT", "/sere/policy", **arguments))[0] == 413
    assert run(ask(layer(inner), "DELETE", "/sere/policy", key="t-ops"))[0] == 200, "handed on"
    assert run(ask(layer(inner), "DELETE", "/sere/policy"))[0] == 401
    assert run(ask(layer(inner), "DELETE", "/v1/models"))[0] == 401
    assert run(ask(layer(inner), "DELETE", "/v1/models", key="k-all"))[0] == 200, "vLLM decides"
