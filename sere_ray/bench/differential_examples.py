"""Requests of the comparison with vLLM's server that once differed, or that clients send daily."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

MODEL = "sere-demo"
TEXT, CHAT, MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"
QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "1 + 1"}]}
JSON_TYPE = (("content-type", b"application/json"),)


@dataclass(frozen=True)
class Case:
    """A request as it goes over the wire; the key is added where it is sent.

    Attributes:
        name: unlike any other's.
        headers: names and values, as they are.
        body: None = none.
        with_key: whether the API key is sent.
    """

    name: str
    method: str = "POST"
    path: str = TEXT
    headers: tuple[tuple[str, bytes], ...] = JSON_TYPE
    body: bytes | None = None
    with_key: bool = True


def completion(name: str, **fields: Any) -> Case:
    """A short completion, with these fields in place of or beside its own."""
    body = {"model": MODEL, "prompt": "1 + 1", "max_tokens": 2, "temperature": 0, **fields}
    return Case(f"completion: {name}", body=json.dumps(body).encode())


def chat(name: str, **fields: Any) -> Case:
    """A short chat, with these fields in place of or beside its own."""
    body = {"model": MODEL, **QUESTION, "max_tokens": 2, "temperature": 0, **fields}
    return Case(f"chat: {name}", path=CHAT, body=json.dumps(body).encode())


def examples() -> Iterator[Case]:
    """What once differed, and what clients do every day."""
    good = completion("plain")
    yield good
    yield completion("streamed", stream=True)
    yield completion("streamed with usage", stream=True, stream_options={"include_usage": True})
    yield completion("two answers", n=2, temperature=1, seed=1)
    yield completion("logprobs", logprobs=2)
    yield completion("echo", echo=True)
    yield completion("batch", prompt=["a", "b"])
    yield completion("tokens", prompt=[5, 6, 7])
    yield completion("batch of tokens", prompt=[[5], [6, 7]])
    yield completion("no prompt", prompt=None)
    yield completion("empty batch", prompt=[])
    yield completion("empty prompt", prompt="")
    yield completion("empty prompt in a batch", prompt=["a", ""])
    yield completion("mixed batch", prompt=[1, "a"])
    yield completion("token beyond the vocabulary", prompt=[10**9])
    yield completion("negative token", prompt=[-1])
    yield completion("lone surrogate", prompt="a\ud800b")
    yield completion("zero character", prompt="a\0b")
    yield completion("too long", prompt="a " * 999)
    yield completion("too many tokens asked for", max_tokens=100_000)
    yield completion("model with a colon", model="other:adapter")
    yield completion("model with the own name and a colon", model=f"{MODEL}:adapter")
    yield completion("model of slashes", model="../../etc/passwd")
    yield completion("model null", model=None)
    yield completion("model empty", model="")
    yield completion("model number", model=5)
    yield completion("temperature NaN", temperature=float("nan"))
    yield completion("temperature infinite", temperature=float("inf"))
    yield completion("top_p NaN", top_p=float("nan"))
    yield completion("n 0", n=0)
    yield completion("n huge", n=10**30)
    yield completion("n text", n="two")
    yield completion("stop of numbers", stop=[1])
    yield completion("grammar broken", structured_outputs={"grammar": "root ::= ("})
    yield completion("schema broken", structured_outputs={"json": "{"})
    yield completion("two grammars", structured_outputs={"regex": "a", "choice": ["a"]})
    yield completion("logit bias of words", logit_bias={"a": 1})
    yield completion("logit bias beyond the vocabulary", logit_bias={"99999999": 1})
    yield completion("stream options without stream", stream_options={"include_usage": True})
    yield completion("long wrong value", max_tokens="x" * 60_000)
    yield completion("many wrong values", prompt=[{"a": 1}] * 2_000)
    yield completion("salt empty", cache_salt="")
    yield completion("salt number", cache_salt=5)
    yield completion("salt", cache_salt="mine")
    yield completion("unknown field", surprise={"a": [1]})
    yield completion("stream of an error", stream=True, max_tokens=-1)
    yield completion("prompt logprobs streamed", stream=True, prompt_logprobs=1)
    yield completion("embeddings that are none", prompt=None, prompt_embeds="AAAA")
    yield completion("request id", request_id="my-id")
    yield from _chats()
    yield from _bodies(good)
    yield from _paths(good)
    yield from _headers(good)


def _chats() -> Iterator[Case]:
    def content(value: Any) -> Any:
        return [{"role": "user", "content": value}]

    yield chat("plain")
    yield chat("streamed", stream=True)
    yield chat("logprobs", logprobs=True, top_logprobs=2)
    yield chat("text parts", messages=content([{"type": "text", "text": "a"}]))
    yield chat("messages null", messages=None)
    yield chat("messages empty", messages=[])
    yield chat("messages text", messages="a")
    yield chat("messages of numbers", messages=[1])
    yield chat("unknown part", messages=content([{"type": "hologram", "hologram": "a"}]))
    yield chat("part without type", messages=content([{}]))
    yield chat("part null", messages=content([None]))
    yield chat("part a number", messages=content([7]))
    yield chat("content a number", messages=content(7))
    yield chat("content null", messages=content(None))
    yield chat("image for a text model", messages=content([IMAGE]))
    yield chat("lone surrogate", messages=content("\udfff"))
    yield chat("unknown role", messages=[{"role": "oracle", "content": "a"}])
    yield chat("role missing", messages=[{"content": "a"}])
    yield chat("assistant calls a tool", messages=[TOOL_CALL])
    yield chat("tool call of nothing", messages=[{"role": "assistant", "tool_calls": [{}]}])
    yield chat("tool call a number", messages=[{"role": "assistant", "tool_calls": 5}])
    yield chat("template arguments that clash", chat_template_kwargs={"messages": []})
    yield chat("template arguments that tokenize", chat_template_kwargs={"tokenize": True})
    yield chat("template arguments a list", chat_template_kwargs=[1])
    yield chat("template of the client", chat_template="{{ 1 / 0 }}")
    yield chat("tools broken", tools=[{"type": "function"}])
    yield chat("tool choice without tools", tool_choice="required")
    yield chat("response format unknown", response_format={"type": "poem"})
    yield chat("response format without schema", response_format={"type": "json_schema"})
    yield chat("model with a colon", model="a:b")
    yield chat("too long", messages=content("a " * 999))
    yield chat("n 3", n=3, temperature=1, seed=3)
    yield chat("audio", modalities=["audio"])


CONTENT_TYPES = (
    b"text/plain",
    b"application/x-www-form-urlencoded",
    b"",
    b"application/JSON",
    b"application/json; charset=utf-8",
    b"application/json ;x",
    b"application/json5",
    b"application/vnd.api+json",
    b"multipart/form-data; boundary=a",
    b"\xff\xfe",
)
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TOOL_CALL = {
    "role": "assistant",
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "not JSON"}}
    ],
}


def _bodies(good: Case) -> Iterator[Case]:
    contents = {
        "none": None,
        "empty": b"",
        "a brace": b"{",
        "a list": b"[]",
        "a text": b'"a"',
        "null": b"null",
        "a number": b"5",
        "empty object": b"{}",
        "not UTF-8": b'{"model": "\xff"}',
        "UTF-16": (good.body or b"").decode().encode("utf-16"),
        "byte order mark": b"\xef\xbb\xbf" + (good.body or b""),
        "garbage behind": (good.body or b"") + b" x",
        "twice the key": b'{"model": "other", ' + (good.body or b"")[1:],
        "nested deeply": b'{"a": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        "nested": b'{"a": ' + b"[" * 400 + b"]" * 400 + b", " + (good.body or b"")[1:],
        "a number of 5000 digits": b'{"max_tokens": ' + b"9" * 5_000 + b"}",
        "a form": b"prompt=a",
    }
    for path in (TEXT, CHAT):
        for name, content in contents.items():
            yield replace(good, name=f"{path} body: {name}", path=path, body=content)


def _paths(good: Case) -> Iterator[Case]:
    nothing = Case("", "GET", MODELS, (), None)
    for method, path in (
        ("GET", MODELS),
        ("GET", f"{MODELS}/"),
        ("HEAD", MODELS),
        ("POST", MODELS),
        ("DELETE", MODELS),
        ("OPTIONS", MODELS),
        ("PATCH", MODELS),
        ("GET", f"{MODELS}/{MODEL}"),
        ("GET", f"{MODELS}/other"),
        ("GET", "/health"),
        ("GET", "/health/"),
        ("HEAD", "/health"),
        ("POST", "/health"),
        ("GET", TEXT),
        ("GET", CHAT),
        ("PUT", TEXT),
        ("GET", "/v1"),
        ("GET", "/v1/"),
        ("GET", "/v1/nothing"),
        ("POST", "/v1/nothing"),
        ("GET", "/nothing"),
        ("GET", "/"),
        ("GET", "/v1/models?a=%ff"),
        ("GET", "/v1/%2e%2e/health"),
        ("GET", "//v1/models"),
        ("GET", "/V1/models"),
        ("GET", "/v1/models%00"),
        ("BREW", MODELS),
    ):
        yield replace(nothing, name=f"{method} {path}", method=method, path=path)
    for path in (f"{TEXT}/", f"{CHAT}/", "/v1/nothing", f"{TEXT}?stream=true"):
        yield replace(good, name=f"a completion to {path}", path=path)
    for path in ("/metrics", "/version", "/ping", "/openapi.json", "/docs", "/load"):
        yield replace(nothing, name=f"GET {path}", path=path)
    for path in ("/tokenize", "/detokenize", "/v1/responses", "/v1/messages", f"{CHAT}/batch"):
        yield replace(good, name=f"a completion to {path}", path=path)
    for path in ("/health", MODELS, "/nothing", "/v1/nothing"):
        yield replace(nothing, name=f"GET {path} without a key", path=path, with_key=False)
    yield replace(good, name="a completion without a key", with_key=False)


def _headers(good: Case) -> Iterator[Case]:
    for value in CONTENT_TYPES:
        name = f"content type {value.decode('latin-1')}"
        yield replace(good, name=name, headers=(("content-type", value),))
    yield replace(good, name="no content type", headers=())
    for name, value in (
        ("origin", b"https://elsewhere.example"),
        ("origin", b"null"),
        ("x-request-id", b"\xff\xfe"),
        ("x-request-id", b"a" * 300),
        ("x-request-id", b""),
        ("x-session-id", b"\xff"),
        ("serve_multiplexed_model_id", b"other"),
        ("x-data-parallel-rank", b"5"),
        ("x-data-parallel-rank", b"\xe9"),
        ("traceparent", b"\x80"),
        ("accept", b"text/event-stream"),
        ("accept-language", b"\xff"),
        ("cookie", b"a=\xff"),
        ("x-odd", b"\x80\x81"),
        ("x-long", b"a" * 4000),
        ("expect", b"100-continue"),
    ):
        shown = value[:20].decode("latin-1")
        yield replace(good, name=f"header {name}: {shown}", headers=(*JSON_TYPE, (name, value)))
