"""The command line's requests: no proxy reads a token; addresses are as people write them."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request

import pytest

from sere_ray.loadtest.endpoint import find_model, read_keys
from sere_ray.loadtest.workload import ClientKey
from sere_ray.serve.client import request
from sere_ray.util.errors import SereError
from sere_ray.util.http import address, environment_for, is_direct, open_url, root
from sere_ray.util.ports import check_free


class Stub(ThreadingHTTPServer):
    """Answers every GET with JSON of an endpoint or, as a proxy, with 502; keeps what it saw."""

    def __init__(self, host: str, status: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.status, self.seen = status, list[tuple[str, str | None]]()
        super().__init__((host, 0), Handler)
        self.url = f"http://{address(host, self.server_address[1])}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        stub: Any = self.server
        stub.seen.append((self.path, self.headers["Authorization"]))
        body = json.dumps({"data": [{"id": "model"}]}).encode()
        self.send_response(stub.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def running(host: str = "127.0.0.1", status: int = 200) -> Iterator[Stub]:
    with Stub(host, status) as stub:
        Thread(target=stub.serve_forever, daemon=True).start()
        try:
            yield stub
        finally:
            stub.shutdown()


@pytest.fixture
def proxy(monkeypatch):
    with running(status=502) as stub:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, stub.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield stub


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_loopback_is_asked_past_the_proxy(proxy, monkeypatch, host, end):
    monkeypatch.setenv("SERE_ADMIN_TOKEN", "secret\n")
    monkeypatch.setenv("OPENAI_API_KEY", "key\n")
    with running(host) as stub:
        request(stub.url + end, "policy")
        assert find_model(root(stub.url + end), read_keys(None), None) == "model"
    assert stub.seen == [("/sere/policy", "Bearer secret"), ("/v1/models", "Bearer key")]
    assert proxy.seen == []


def test_a_proxy_elsewhere_never_reads_a_token(proxy):
    """But what holds no token may go through it."""
    unreachable = "http://nowhere.invalid:1"
    with pytest.raises(SereError, match="is it up"):
        find_model(unreachable, [ClientKey(key="secret")], None)
    assert proxy.seen == []
    with pytest.raises(HTTPError):
        open_url(Request(f"{unreachable}/metrics"), 5)
    assert proxy.seen == [(f"{unreachable}/metrics", None)]


def test_programs_with_a_key_are_told_which_host_is_asked_directly(monkeypatch):
    monkeypatch.setenv("no_proxy", "a.example")
    assert environment_for("http://[::1]:8000")["NO_PROXY"] == "a.example,::1"
    assert environment_for("https://b.example")["no_proxy"] == "a.example"


@pytest.mark.parametrize(
    ("url", "has_secret", "direct"),
    [
        ("http://localhost:8000", False, True),
        ("https://127.8.9.1", True, True),
        ("http://[::1]:8000", False, True),
        ("http://example.com", False, False),
        ("http://example.com", True, True),
        ("https://example.com", True, False),
        ("http://localhost.example.com", False, False),
    ],
)
def test_when_no_proxy_is_asked(url, has_secret, direct):
    assert is_direct(url, has_secret=has_secret) == direct


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://::1:8000", "ftp://host", "http://", "http://host:port", ""]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(SereError, match=r"--url = .*http://\[::1\]:8000"):
        root(url)


def test_a_port_that_is_taken_on_ipv6():
    with running("::1") as stub, pytest.raises(SereError, match="already in use"):
        check_free(stub.server_address[1], "--port", host="::1")
