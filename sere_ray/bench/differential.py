"""The same requests to vLLM's own server and to ours: where do status, form and fields differ?

Texts are not compared: ours re-routes, and messages may say more. What differs on purpose stands in
:data:`INTENDED`, with its reason; ``docs/serve.md`` has the same list.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any

from sere_ray.bench.differential_examples import CHAT, MODEL, MODELS, Case

CLIENTS = 4
SECONDS = 60.0
LEAK = re.compile(
    r"Traceback|File \\?\"|site-packages|/root/|/tmp/|/home/|\bpid=|actor_id|node_id|ray::"
    r"|\b[0-9a-f]{32,}\b"
)
"""What no error may hold: places of files, and names of processes, nodes and actors."""


@dataclass(frozen=True)
class Answer:
    """Of one server to one case; status 0 = the connection broke, and the body says how."""

    status: int
    media_type: str
    body: bytes

    @property
    def document(self) -> Any:
        """Its JSON; None = it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


@dataclass(frozen=True)
class Intended:
    """A difference that is meant."""

    what: str
    reason: str
    holds: Callable[[Case, Answer, Answer], bool]
    """Whether our answer to a case, beside vLLM's, is this."""


def _code(answer: Answer) -> object:
    document = answer.document
    error = document.get("error") if isinstance(document, dict) else None
    return error.get("code") if isinstance(error, dict) else None


def _is_detail(answer: Answer) -> bool:
    """FastAPI's own form of an error."""
    document = answer.document
    return isinstance(document, dict) and list(document) == ["detail"]


UNSERVED = ("/metrics", "/version", "/ping", "/openapi.json", "/docs", "/load", "/tokenize",
            "/detokenize", "/v1/responses", "/v1/messages", f"{CHAT}/batch")  # fmt: skip
INTENDED = (
    Intended(
        "400, 404, 405 in OpenAI's form",
        'vLLM\'s routes and body parser answer `{"detail": ...}`, which clients cannot read',
        lambda case, answer, vllm: answer.status == vllm.status and _is_detail(vllm),
    ),
    Intended(
        "401 has OpenAI's form and `WWW-Authenticate`",
        "clients show its message; vLLM's is not OpenAI's form",
        lambda case, answer, vllm: answer.status == 401 and _code(answer) == "invalid_api_key",
    ),
    Intended(
        "404 for other routes of vLLM's",
        "they do not know keys, tiers and limits",
        lambda case, answer, vllm: case.path in UNSERVED and answer.status == 404,
    ),
    Intended(
        "`GET /v1/models/{id}`",
        "OpenAI's clients ask for it; vLLM 0.32 has no such route",
        lambda case, answer, vllm: case.path == f"{MODELS}/{MODEL}" and answer.status == 200,
    ),
    Intended(
        "403 `foreign_origin`",
        "a page of another origin must not make the server compute: `access.allowed_origins`",
        lambda case, answer, vllm: answer.status == 403 and _code(answer) == "foreign_origin",
    ),
    Intended(
        "413 `body_too_large`",
        "a body takes memory before it can be refused: `access.max_body_bytes`",
        lambda case, answer, vllm: answer.status == 413 and _code(answer) == "body_too_large",
    ),
    Intended(
        "400 `too_many_answers`",
        "one key must not take the place of all others: `access.max_concurrent_per_key`",
        lambda case, answer, vllm: _code(answer) == "too_many_answers",
    ),
    Intended(
        "422 `invalid_parameter`, `invalid_tier` for `vllm_xargs`",
        "they carry the tier, so what is no object or no tier is refused before vLLM sees it",
        lambda case, answer, vllm: _code(answer) in ("invalid_parameter", "invalid_tier"),
    ),
)


def ask(url: str, key: str, case: Case) -> Answer:
    """Send one case."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=SECONDS)
    headers: list[tuple[str, bytes]] = list(case.headers)
    if case.with_key:
        headers.append(("authorization", f"Bearer {key}".encode()))
    if case.body is not None:
        headers.append(("content-length", str(len(case.body)).encode()))
    try:
        connection.putrequest(case.method, case.path, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders(case.body)
        response = connection.getresponse()
        kind = response.getheader("content-type", "").partition(";")[0].strip().lower()
        return Answer(response.status, kind, response.read())
    except (HTTPException, OSError) as error:
        return Answer(0, "", type(error).__name__.encode())
    finally:
        connection.close()


def ask_all(url: str, key: str, cases: Sequence[Case]) -> list[Answer]:
    """Send all cases, ``CLIENTS`` at a time; answers in the order of the cases."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(lambda case: ask(url, key, case), cases))


def form(answer: Answer) -> Any:
    """What is compared of an answer beside its status."""
    if answer.media_type == "text/event-stream":
        events = [line[6:] for line in answer.body.split(b"\n") if line.startswith(b"data: ")]
        forms = {json.dumps(_keys(json.loads(e))) for e in events if e != b"[DONE]"}
        return ["events", sorted(forms), events[-1:] == [b"[DONE]"]]
    document = answer.document
    if isinstance(document, dict) and isinstance(document.get("error"), dict):
        error = document["error"]
        fixed = {name: error.get(name) for name in ("type", "param", "code")}
        return ["error", sorted(document), sorted(error), fixed, isinstance(error["message"], str)]
    return [answer.media_type, _keys(document) if document is not None else bool(answer.body)]


def _keys(value: Any) -> Any:
    """The names of a JSON document, in depth; of a list, those of its first entry."""
    if isinstance(value, dict):
        return {name: _keys(value[name]) for name in sorted(value)}
    return [len(value), _keys(value[0])] if isinstance(value, list) and value else None


def leaks(answer: Answer) -> bool:
    """Whether an error tells of the server's inside, or hands the whole input back."""
    if answer.status < 400:
        return False
    return LEAK.search(answer.body.decode("utf-8", "replace")) is not None


def compare(
    cases: Sequence[Case], server: str, ours: Sequence[Answer], vllm: Sequence[Answer]
) -> Iterator[dict[str, Any]]:
    """A row for each case.

    Args:
        cases: what was sent.
        server: name of ours.
        ours: its answers.
        vllm: those of vLLM's server.
    """
    for case, answer, other in zip(cases, ours, vllm, strict=True):
        same = answer.status == other.status and form(answer) == form(other)
        same = same and not (leaks(answer) and not leaks(other))
        intended = next((i.what for i in INTENDED if i.holds(case, answer, other)), None)
        yield {
            "case": case.name,
            "server": server,
            "status": answer.status,
            "vllm_status": other.status,
            "as_vllm": same,
            "intended": None if same else intended,
        }


def unintended(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows that differ from vLLM for no reason."""
    return [row for row in rows if not row["as_vllm"] and row["intended"] is None]
