"""Small real servers on the loopback: good ones, and ones that break off, stall or lie."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sere_ray.loadtest.client import now
from sere_ray.observe.stats import totals

DONE = "[DONE]"


def token(text, finish=None):
    delta = {"content": text} if text else {}
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def usage(completion, prompt=4, cached=None):
    counted = {"completion_tokens": completion, "prompt_tokens": prompt}
    if cached is not None:
        counted["prompt_tokens_details"] = {"cached_tokens": cached}
    return json.dumps({"choices": [], "usage": counted})


WHOLE = [token("a "), token("b "), token("c"), token("", "stop"), usage(3), DONE]


def whole_answer(text):
    """An answer of either route that is not streamed."""
    message = {"text": text, "message": {"content": text}, "finish_reason": "stop"}
    return {"choices": [message], "usage": {"completion_tokens": len(text.split())}}


@contextmanager
def serving(
    events=tuple(WHOLE),
    *,
    status=200,
    gap=0.0,
    cut=False,
    stall=0.0,
    control=None,
    answer=None,
    refused=1 << 30,
):
    """Answers every POST with the events.

    Args:
        events: data of server-sent events.
        status: other than 200: an OpenAI error.
        refused: how many requests get that error.
        gap: seconds before each event.
        cut: close the connection instead of ending the message.
        stall: seconds of silence after the events, before the end.
        control: what answers ``/sere``; see :class:`Control`.
        answer: makes an answer from a question; it is sent whole, not in events.

    Yields:
        The address; ``requests`` of the server holds (headers, body) of what was asked, ``written``
        when events were, by the client's clock.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            if self.path == "/v1/models":
                return self.answer_json(200, {"data": [{"id": "tiny"}]})
            return self.answer_control(None)

        def do_PUT(self):
            self.answer_control(json.loads(self.body()))

        def do_POST(self):
            asked = json.loads(self.body())
            server.requests.append((dict(self.headers), asked))
            if status != 200 and len(server.requests) <= refused:
                return self.answer_json(status, {"error": {"message": "not you"}})
            if answer is not None:
                return self.answer_json(200, answer(asked))
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for event in events:
                    time.sleep(gap)
                    server.written.append(now())
                    data = f"data: {event}\n\n".encode()
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                time.sleep(stall)
                if cut:
                    self.close_connection = True
                else:
                    self.wfile.write(b"0\r\n\r\n")
            except OSError:
                self.close_connection = True  # the client went away

        def answer_control(self, change):
            if control is None or not self.path.startswith("/sere/"):
                return self.answer_json(404, {"error": {"message": "no such path"}})
            return self.answer_json(*control.answer(self.path.removeprefix("/sere/"), change))

        def answer_json(self, code, document):
            content = json.dumps(document).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def body(self):
            return self.rfile.read(int(self.headers["Content-Length"]))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests, server.written = [], []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Control:
    """A control API that remembers the policies it was told, and counts nothing.

    Args:
        refuse: a mode that it refuses.
    """

    def __init__(self, refuse=None):
        self.policy = {"similarity": "a", "select_top_k": 3, "threshold": 0.5, "mode": "on"}
        self.history, self._refuse = [], refuse

    def answer(self, what, change):
        """``(status, document)`` of a request to ``/sere/{what}``."""
        if change is not None:
            if change.get("mode") == self._refuse:
                return 422, {"error": {"message": f"mode {self._refuse} is refused"}}
            self.policy = {**self.policy, **change}
            self.history.append((self.policy["mode"], self.policy["select_top_k"]))
        status = {
            "version": 1,
            "mode": self.policy["mode"],
            "policy": self.policy,
            "auto": None,
            "replicas": 2,
            "replicas_settled": 2,
        }
        if self.policy["mode"] == "auto":  # at level 1, which sets S
            status["policy"] = {**self.policy, "mode": "on", "select_top_k": 1}
            status["auto"] = {"level": 1, "base": {**self.policy, "mode": "off"}}
        if what == "policy":
            return 200, status
        return 200, {**status, "total": totals([]), "per_replica": []}
