import json
import re
import socket
import struct
import threading
import time

import gevent
import pytest

from sere_ray.loadtest.client import Client, Limits, now
from sere_ray.util.errors import SereError
from tests.loadtest.servers import DONE, WHOLE, serving, token, usage

LIMITS = Limits(connect=5, stall=1.5, total=20)


def ask(url, limits=LIMITS, scheduled=None):
    client = Client(f"{url}/v1", limits)
    try:
        return client.stream(
            "/chat/completions", b"{}", {}, now() if scheduled is None else scheduled
        )
    finally:
        client.close()


def test_a_whole_answer():
    with serving([token("a "), token("b"), token("", "stop"), usage(5, 10, 6), DONE]) as server:
        outcome = ask(server.url)
    assert outcome.error is None
    assert outcome.text == "a b"
    assert (outcome.output_tokens, outcome.prompt_tokens, outcome.cached_tokens) == (5, 10, 6)
    assert len(outcome.times) == 2


def test_times_are_those_of_the_events():
    start = now()
    with serving(gap=0.1) as server:
        outcome = ask(server.url, scheduled=start)
    first, *_, last = written = server.written[:3]
    assert outcome.times == pytest.approx(written, abs=0.02)
    assert outcome.ttft == pytest.approx(first - start, abs=0.02)
    assert outcome.tpot == pytest.approx((last - first) / 2, abs=0.02)


def test_latency_counts_from_when_it_was_due():
    with serving() as server:
        outcome = ask(server.url, scheduled=now() - 1)
    assert 1 <= outcome.ttft < 1.5


def test_reads_of_a_busy_process_are_not_late():
    """The kernel stamps what comes while the process sleeps, and the stamps are believed."""
    with serving([token("a"), token("b"), token("", "stop"), DONE], gap=0.5) as server:
        client = Client(f"{server.url}/v1", Limits())
        start = now()
        stream = gevent.spawn(client.stream, "/chat/completions", b"{}", {}, start)
        while not server.requests:
            gevent.sleep(0.005)
        while not server.written:  # the event loop is blocked while the first token comes
            time.sleep(0.01)
        time.sleep(0.15)
        outcome = stream.get()
        client.close()
    assert outcome.times[0] == pytest.approx(server.written[0], abs=0.05)


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"events": WHOLE[:2], "cut": True}, "cut: the connection was closed"),
        ({"events": WHOLE[:3]}, "cut: the stream ended without finish_reason"),
        ({"events": WHOLE[:4]}, r"cut: the stream ended without \[DONE\]"),
        ({"events": WHOLE[:2], "stall": 6.0}, r"stalled: no byte within 1\.5 s"),
        ({"events": [token("a"), "{nonsense"]}, "malformed event: b'{nonsense'"),
        ({"events": [token("a"), '{"id": 1}']}, "malformed event"),
        ({"events": [token("a"), '["list"]']}, "malformed event"),
        ({"events": [token("a"), '{"choices": [], "usage": [1]}']}, "malformed event"),
        (
            {"events": ['{"choices": [], "usage": {"prompt_tokens_details": [1]}}']},
            "malformed event",
        ),
        ({"events": [token("a"), '{"error": {"message": "engine lost"}}']}, "engine lost"),
        ({"events": [token("", "stop"), DONE]}, "empty: no event with output"),
        ({"status": 401}, "HTTP 401: .*not you"),
    ],
)
def test_what_is_no_answer_is_a_failure(server, words):
    with serving(**server) as broken:
        outcome = ask(broken.url)
    assert outcome.error is not None
    assert re.search(words, outcome.error), outcome.error
    assert not outcome.times


def test_an_answer_without_end_is_given_up():
    with serving([token("a")] * 1000, gap=0.05) as server:
        outcome = ask(server.url, Limits(total=0.4))
    assert outcome.error == "too long: no end within 0.4 s"


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert ask(f"http://127.0.0.1:{port}").error == "connection: Connection refused"


def test_not_http():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak():
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(b"SSH-2.0-hello\r\n")
            connection.close()

        thread = threading.Thread(target=speak)
        thread.start()
        outcome = ask(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert outcome.error.startswith("not HTTP")


def test_a_connection_is_used_again_and_replaced_when_the_server_closed_it():
    with serving() as server:
        client = Client(f"{server.url}/v1", LIMITS)
        for _ in range(2):
            assert client.stream("/chat/completions", b"{}", {}, now()).error is None
        assert len(client._idle) == 1
        client._idle[0].shutdown(socket.SHUT_RDWR)
        assert client.stream("/chat/completions", b"{}", {}, now()).error is None
        client.close()


def test_an_answer_that_is_cut_on_a_kept_connection_is_not_asked_for_again():
    """With a reset, as of a killed proxy; a connection closed while idle is another matter."""
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            for events in (WHOLE, WHOLE[:2]):
                asked.append(connection.recv(10_000))
                connection.sendall(whole)
                for event in events:
                    data = f"data: {event}\n\n".encode()
                    connection.sendall(b"%x\r\n%s\r\n" % (len(data), data))
                if events == WHOLE:
                    connection.sendall(b"0\r\n\r\n")
            time.sleep(0.2)
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", LIMITS)
        first, second = (client.stream("/chat/completions", b"{}", {}, now()) for _ in range(2))
        client.close()
        thread.join()
    assert first.error is None
    assert second.error.startswith("connection: ")
    assert len(asked) == 2


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "tool_calls"])
def test_what_a_model_thinks_and_calls_is_output_but_no_answer(key):
    """Its tokens are counted, so its times are, too."""
    value = [{"index": 0}] if key == "tool_calls" else "so"
    delta = json.dumps({"choices": [{"delta": {key: value}}]})
    events = [delta, delta, token("5"), token("", "stop"), usage(3), DONE]
    with serving(events, gap=0.05) as server:
        outcome = ask(server.url)
    assert (outcome.error, outcome.text, outcome.output_tokens) == (None, "5", 3)
    assert len(outcome.times) == 3
    assert outcome.tpot == pytest.approx(0.05, abs=0.02)


def test_what_is_not_a_url(has_words):
    with pytest.raises(SereError) as error:
        Client("localhost:8000", LIMITS)
    has_words(str(error.value), "localhost:8000", "http://")
