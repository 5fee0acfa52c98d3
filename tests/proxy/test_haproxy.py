"""HAProxy with our limits, as Ray writes its configuration: HAProxy itself, a stand-in replica."""

import json
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread, Timer

import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from sere_ray.proxy import haproxy
from sere_ray.proxy.haproxy import main, most_connections, real_binary, with_limits, write_files
from sere_ray.proxy.limits import LOOPBACK_HEADER, Limits
from sere_ray.util.errors import SereError
from sere_ray.util.ports import free_ports

LIMITS = Limits(header_s=0.6, body_s=0.6, idle_s=1, connections=64, unfinished_share=0.5)
SECRET = "the-word"


class Replica(BaseHTTPRequestHandler):
    """Answers with the headers that reached it."""

    def do_GET(self):
        time.sleep(2 if self.path == "/slow" else 0)
        body = json.dumps({k.lower(): v for k, v in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET

    def do_POST(self):
        self.send_response(401)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass

    def handle(self):
        with suppress(ConnectionError):  # a client that looks whether HAProxy is up
            super().handle()


def configuration(folder, port, replica, router=None, prefixes=("/",)):
    """As Ray writes it, of applications with one replica each; the first has its name alone."""
    config = HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "metrics.sock"),
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        is_head=True,
        stats_port=free_ports(1)[0],
        metrics_port=free_ports(1)[0],
    )
    config.has_received_routes = config.has_received_servers = True
    routers = [ServerConfig("router", "127.0.0.1", router)] if router else []
    backends = {}
    for prefix in prefixes:
        name = f"app{prefix.replace('/', '')}"
        backends[f"http-{name}"] = BackendConfig(
            name=f"http-{name}",
            path_prefix=prefix,
            app_name=name,
            servers=[ServerConfig("replica", "127.0.0.1", replica, "r1")],
            ingress_request_router_servers=routers,
            fallback_server=ServerConfig("fallback", "127.0.0.1", free_ports(1)[0]),
        )
    path = folder / "haproxy.cfg"
    HAProxyApi(config, backends, str(path))._generate_config_file_internal()
    return path


@contextmanager
def running(folder, limits=LIMITS, *, replica=None, prefixes=("/",)):
    """HAProxy before a replica; yields its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Replica)
    Thread(target=server.serve_forever, daemon=True).start()
    port = free_ports(1)[0]
    path = configuration(folder, port, replica or server.server_port, prefixes=prefixes)
    content = with_limits(
        path.read_text().replace("check observe", "observe"),  # up at once
        limits,
        write_files(folder, limits),
        SECRET,
        most_connections(),
    )
    path.write_text(content)
    process = subprocess.Popen([real_binary(), "-db", "-f", path], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with running(tmp_path_factory.mktemp("haproxy")) as found:
        yield found


def sent(port, data, *, source=None):
    """Send this and read until the end: ``(status, headers and body, seconds)``."""
    address = None if source is None else (source, 0)
    start = time.monotonic()
    with closing(socket.create_connection(("127.0.0.1", port), 10, address)) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.lower(), body, time.monotonic() - start


GET = b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{",
        b"PUT /sere/policy HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{",
    ],
)
def test_a_half_sent_body_ends_with_408_in_openais_form(port, data):
    status, head, body, seconds = sent(port, data)
    assert status == 408
    assert b"application/json" in head
    assert json.loads(body)["error"]["code"] == "request_timeout"
    assert 0.4 < seconds < 3


def test_half_sent_headers_end_with_408(port):
    """In HAProxy's words: it takes none of ours before it knows of a request."""
    status, *_, seconds = sent(port, b"GET /v1/models HTTP/1.1\r\nhost: a\r\n")
    assert status == 408
    assert 0.4 < seconds < 3


def test_a_large_body_is_not_read_on_when_its_request_is_refused(port):
    data = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 90000\r\n\r\n"
    status, *_, seconds = sent(port, data + b" " * 40_000)
    assert status == 401
    assert seconds < 3


def test_a_client_may_wait_for_its_answer_as_long_as_it_takes(port):
    assert sent(port, GET.replace(b"/v1/models", b"/slow") + b"\r\n")[0] == 200


def test_an_idle_connection_is_closed(port):
    status, *_, seconds = sent(port, GET.replace(b"connection: close\r\n", b"") + b"\r\n")
    assert status == 200
    assert 0.5 < seconds < 4


def test_headers_that_a_client_must_not_set(port):
    mine = (
        b"x-request-disconnect-disabled: ?1\r\nx-request-timeout-seconds: 1\r\n"
        b"x-sere-loopback: guessed\r\n\r\n"
    )
    headers = json.loads(sent(port, GET + mine)[2])
    assert "x-request-disconnect-disabled" not in headers
    assert "x-request-timeout-seconds" not in headers
    assert headers[LOOPBACK_HEADER] == SECRET, "of this machine, as HAProxy says itself"


def test_unfinished_requests_take_their_share_and_no_more(port):
    """32 of 64 connections; one address stops at 24, and others are served on."""

    def is_served(source):
        try:
            return sent(port, GET + b"\r\n", source=source)[0] == 200
        except ConnectionError:
            return False

    with ExitStack() as stack:
        for _ in range(60):
            with suppress(ConnectionError):  # refused
                half = socket.create_connection(("127.0.0.1", port), 5)
                stack.enter_context(closing(half))
                half.sendall(b"GET /v1/models HTTP/1.1\r\n")
        time.sleep(0.1)  # those that are refused count until they are gone
        assert is_served("127.0.0.2"), "another address"
        assert not is_served("127.0.0.1"), "the address that holds most of them"
    time.sleep(1)
    assert is_served("127.0.0.1")


def test_nobody_there_is_503_in_openais_form(tmp_path):
    with running(tmp_path, replica=free_ports(1)[0]) as port:
        status, head, body, _ = sent(port, GET + b"\r\n")
    assert status == 503
    assert b"retry-after: 5" in head
    assert json.loads(body)["error"]["type"] == "server_error"


def administer(folder, command):
    with closing(socket.socket(socket.AF_UNIX)) as admin:
        admin.connect(str(folder / "admin.sock"))
        admin.sendall(command.encode() + b"\n")
        return admin.recv(65536)


POST = (
    b"POST /v1/completions?a=b HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    b"content-length: 0\r\n\r\n"
)
WAITS = LIMITS.model_copy(update={"queue_while_restarting_s": 2.0, "max_queued": 2})


@pytest.fixture(scope="module")
def restarting(tmp_path_factory):
    """``(port, folder)`` of HAProxy whose only replica is out of service as a test begins."""
    folder = tmp_path_factory.mktemp("waits")
    with running(folder, WAITS) as port:
        yield port, folder


def test_a_request_waits_for_an_engine_that_restarts(restarting):
    port, folder = restarting
    administer(folder, "disable server http-app/replica")
    status, _, _, seconds = sent(port, POST)
    assert status == 503
    assert 1 < seconds < 4
    status, _, _, seconds = sent(port, GET + b"\r\n")
    assert status == 503
    assert seconds < 0.9, "a question of how things are does not wait"
    Timer(0.5, administer, (folder, "enable server http-app/replica")).start()
    status, _, _, seconds = sent(port, POST)
    assert status == 401, "the replica's answer"
    assert 0.4 < seconds < 1.9


def test_no_more_requests_wait_than_may(restarting):
    port, folder = restarting
    administer(folder, "disable server http-app/replica")
    with ThreadPoolExecutor(5) as threads:
        answers = list(threads.map(lambda _: sent(port, POST), range(5)))
    assert sorted(seconds < 0.9 for *_, seconds in answers) == [False] * 2 + [True] * 3


def test_who_hangs_up_while_waiting_leaves_a_place(tmp_path):
    """HAProxy ends the wait of some of them without a word to it."""
    limits = WAITS.model_copy(update={"max_queued": 20})
    with running(tmp_path, limits) as port, ThreadPoolExecutor(20) as threads:
        administer(tmp_path, "disable server http-app/replica")
        for _ in range(limits.max_queued):
            with closing(socket.create_connection(("127.0.0.1", port))) as connection:
                connection.sendall(POST)
                time.sleep(0.02)
        time.sleep(limits.queue_while_restarting_s + 1)
        answers = list(threads.map(lambda _: sent(port, POST), range(limits.max_queued)))
    assert min(seconds for *_, seconds in answers) > 0.9, "all of them wait"


def test_a_request_waits_for_an_engine_of_its_own_application(tmp_path):
    with running(tmp_path, WAITS, prefixes=("/", "/other")) as port:
        administer(tmp_path, "disable server http-app/replica")
        assert sent(port, POST.replace(b"/v1", b"/other/v1"))[0] == 401, "the replica's answer"
        status, *_, seconds = sent(port, POST)
        assert status == 503
        assert seconds > 0.9
        administer(tmp_path, "enable server http-app/replica")
        administer(tmp_path, "disable server http-appother/replica")
        assert sent(port, POST)[0] == 401
        assert sent(port, POST.replace(b"/v1", b"/other/v1"))[-1] > 0.9


def test_a_request_that_waits_asks_again_where_a_new_haproxy_took_over(restarting):
    """As after a restart of a gang: the new one knows the new replicas."""
    port, folder = restarting
    administer(folder, "disable server http-app/replica")
    pid = re.search(rb"Pid: (\d+)", administer(folder, "show info"))[1]
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(sent, port, POST)
        elsewhere = threads.submit(sent, port, POST.replace(b"/v1", b"//v1"))
        time.sleep(0.4)
        command = [real_binary(), "-db", "-f", folder / "haproxy.cfg", "-sf", pid]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            status, head, _, seconds = waiting.result()
            assert (status, seconds < 1.9) == (307, True)
            assert b"location: /v1/completions?a=b\r" in head + b"\r"
            assert elsewhere.result()[0] == 503, "that would be the address of another host"
            assert sent(port, POST)[0] == 401
        finally:
            process.kill()
            process.wait()


def test_the_form_of_rays_configuration(tmp_path):
    """All that is replaced is there; ports of state and metrics are of this machine alone."""
    path = configuration(tmp_path, *free_ports(3))
    before = path.read_text()
    assert "Ingress request router failed" in before
    assert " backup" in before
    after = with_limits(before, LIMITS, write_files(tmp_path, LIMITS), None, 1000)
    assert "Ingress request router failed" not in after
    assert " backup" not in after
    assert "bind :" not in after
    assert "bind *:" not in after
    assert LOOPBACK_HEADER + " the" not in after
    assert with_limits(after, LIMITS, write_files(tmp_path, LIMITS), None, 1000) == after, (
        "a second time changes nothing"
    )
    path.write_text(after)
    subprocess.run([real_binary(), "-c", "-f", path], check=True, capture_output=True)
    with pytest.raises(SereError, match="is it another Ray"):
        with_limits("global\n", LIMITS, write_files(tmp_path, LIMITS), None, 1000)


def test_connections_are_as_many_as_open_files_allow(tmp_path, monkeypatch):
    content = configuration(tmp_path, *free_ports(2)).read_text()
    assert "maxconn 100\n" in with_limits(
        content, Limits(), write_files(tmp_path, LIMITS), None, 100
    )
    monkeypatch.setattr(haproxy.resource, "getrlimit", lambda _: (1024, 1012))
    assert most_connections() == 200


def test_the_program_becomes_haproxy(tmp_path, monkeypatch):
    path = configuration(tmp_path, *free_ports(2))
    ran = []
    monkeypatch.setattr(haproxy.os, "execv", lambda *given: ran.append(given))
    monkeypatch.setattr("sys.argv", ["sere-haproxy", "-db", "-f", str(path)])
    monkeypatch.setenv("SERE_LIMITS", '{"header_s": 3}')
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH", raising=False)
    main()
    assert "timeout http-request 3000ms" in path.read_text()
    assert ran == [(real_binary(), [real_binary(), "-db", "-f", str(path)])]
    monkeypatch.setenv("SERE_LIMITS", '{"headers": 3}')
    with pytest.raises(SystemExit, match=r"SERE_LIMITS = .*headers"):
        main()


def test_nothing_heavy_is_imported():
    """The program is started at each change of the replicas."""
    code = "import sys, sere_ray.proxy.haproxy; print({'ray', 'torch', 'vllm'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout == "set()\n"
