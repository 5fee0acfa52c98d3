"""One streamed request: time stamps first, parsing after the last byte.

The HTTP parser is llhttp, through geventhttpclient; sockets are gevent's, so that thousands of
streams share a thread. Plain HTTP takes each time from the kernel, which stamps packets as they
arrive (``SO_TIMESTAMPNS``): a busy generator reads late but does not measure late.
"""

import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import gevent
import gevent.socket
import gevent.ssl
from geventhttpclient.response import HTTPParseError, HTTPResponse

from sere_ray.loadtest.sse import Answer, BadAnswerError, check_complete, parse
from sere_ray.util.errors import SereError

now = time.perf_counter
"""The clock of all times here; on Linux one for all processes of a machine."""
_SO_TIMESTAMPNS = 35  # Linux, asm-generic/socket.h; Python has no name for it
_TIMESPEC = struct.Struct("qq")
_READ_BYTES = 65536
_ERROR_BODY_BYTES = 2000


@dataclass(frozen=True)
class Limits:
    """How long to wait, in seconds."""

    connect: float = 10.0
    stall: float = 30.0
    """The longest pause between two bytes of an answer."""
    total: float = 600.0
    """The longest that a request may take as a whole."""


@dataclass
class Outcome:
    """What became of one request; times are those of :data:`now`."""

    scheduled: float
    """When it was due; latencies count from here."""
    sent: float = 0.0
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    """When each event with output came."""
    output_tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """Prompt tokens that the prefix cache had; None = the server does not say."""
    text: str = ""
    error: str | None = None
    """Why it counts as failed: ``kind: details``."""
    label: str | None = None
    """The right answer, where the workload knows it."""

    @property
    def ttft(self) -> float:
        """Seconds to the first output."""
        return self.times[0] - self.scheduled

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for answers of one token."""
        if self.output_tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between events with output."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def latency(self) -> float:
        """Seconds to the last output."""
        return self.times[-1] - self.scheduled


class Client:
    """Connections to one endpoint, kept open where the server allows it.

    Args:
        base_url: ends in ``/v1``.
        limits: how long to wait.

    Raises:
        SereError: the URL is not one.
    """

    def __init__(self, base_url: str, limits: Limits = Limits()) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SereError(f"{base_url!r}: must be a URL such as http://127.0.0.1:8000")
        self._secure = parts.scheme == "https"
        self._address = (parts.hostname, parts.port or (443 if self._secure else 80))
        self._host, self._path = parts.netloc.rpartition("@")[2], parts.path.rstrip("/")
        self._limits = limits
        self._idle: list[gevent.socket.socket] = []

    def stream(
        self, path: str, body: bytes, headers: Mapping[str, str], scheduled: float
    ) -> Outcome:
        """POST a request and read the whole answer; failures are in the outcome, not raised."""
        outcome = Outcome(scheduled)
        try:
            with gevent.Timeout(self._limits.total, _TooLongError()):
                answer = self._exchange(self._request(path, body, headers), outcome)
            check_complete(answer)
            _fill(outcome, answer)
        except BadAnswerError as error:
            outcome.error = str(error)
        except _TooLongError:
            outcome.error = f"too long: no end within {self._limits.total:g} s"
        except TimeoutError:
            outcome.error = f"stalled: no byte within {self._limits.stall:g} s"
        except HTTPParseError as error:
            outcome.error = f"not HTTP: {error}"
        except OSError as error:
            outcome.error = f"connection: {error.strerror or error}"
        outcome.ended = now()
        return outcome

    def close(self) -> None:
        """Close idle connections."""
        while self._idle:
            self._idle.pop().close()

    def _exchange(self, request: bytes, outcome: Outcome) -> Answer:
        """Send; where a kept connection turns out to be closed, once more on a new one."""
        while True:
            kept = bool(self._idle)
            connection = self._idle.pop() if kept else self._connect()
            reader = _Reader(connection, self._secure)
            try:
                outcome.sent = now()
                connection.sendall(request)
                reader.read_all()
            except (ConnectionError, _NothingCameError):
                connection.close()
                if not kept or reader.started:  # an answer that was cut is lost, not asked again
                    raise
                continue
            except BaseException:
                connection.close()
                raise
            if reader.response.should_close():
                connection.close()
            else:
                self._idle.append(connection)
            return reader.answer()

    def _connect(self) -> gevent.socket.socket:
        try:
            connection = gevent.socket.create_connection(self._address, self._limits.connect)
        except TimeoutError:
            raise BadAnswerError(
                f"connection: not accepted within {self._limits.connect:g} s"
            ) from None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._secure:
            context = gevent.ssl.create_default_context()
            connection = context.wrap_socket(connection, server_hostname=self._address[0])
        else:
            connection.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        connection.settimeout(self._limits.stall)
        return connection

    def _request(self, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        lines = [
            f"POST {self._path}{path} HTTP/1.1",
            f"Host: {self._host}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class _TooLongError(BaseException):
    """Raised by the timer in whatever the stream waits for."""


class _NothingCameError(BadAnswerError):
    """The connection was closed before the first byte of an answer."""


class _Response(HTTPResponse):
    """Holds only the body bytes that have not been taken yet, not the whole body."""

    def take(self) -> bytes:
        data = bytes(self._body_buffer)
        self._body_buffer.clear()
        return data


class _Reader:
    """Reads one answer from a connection."""

    def __init__(self, connection: gevent.socket.socket, secure: bool) -> None:
        self.response = _Response("POST")
        self._connection, self._secure = connection, secure
        self._reads: list[tuple[float, bytes]] = []
        self.started = False
        """Whether a byte of the answer came."""

    def read_all(self) -> None:
        """Read until the whole answer is here.

        Raises:
            BadAnswerError: the connection was closed before that.
            OSError: it broke, or nothing came in time.
        """
        while not self.response.message_complete:
            at, data = self._read()
            if not data:
                raise (
                    BadAnswerError("cut: the connection was closed in the middle of the answer")
                    if self.started
                    else _NothingCameError("connection: closed without an answer")
                )
            self.started = True
            self.response.feed(data)
            body = self.response.take()
            if body:
                self._reads.append((at, body))

    def answer(self) -> Answer:
        """The parsed stream.

        Raises:
            BadAnswerError: the server refused the request, or the stream is malformed.
        """
        status = self.response.status_code
        if status != 200:
            body = b"".join(data for _, data in self._reads)[:_ERROR_BODY_BYTES]
            text = " ".join(body.decode(errors="replace").split())
            raise BadAnswerError(f"HTTP {status}: {text[:300]}")
        return parse(self._reads)

    def _read(self) -> tuple[float, bytes]:
        if self._secure:
            data = self._connection.recv(_READ_BYTES)
            return now(), data
        data, ancillary, _, _ = self._connection.recvmsg(_READ_BYTES, 64)
        age_ns = 0
        for _, kind, value in ancillary:
            if kind == _SO_TIMESTAMPNS:
                seconds, nanoseconds = _TIMESPEC.unpack(value[: _TIMESPEC.size])
                age_ns = time.time_ns() - (seconds * 1_000_000_000 + nanoseconds)
        return now() - max(age_ns, 0) / 1e9, data


def _fill(outcome: Outcome, answer: Answer) -> None:
    outcome.times, outcome.text = answer.times, answer.text
    outcome.output_tokens = answer.output_tokens
    usage: dict[str, Any] = answer.usage or {}
    outcome.prompt_tokens = usage.get("prompt_tokens")
    outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
